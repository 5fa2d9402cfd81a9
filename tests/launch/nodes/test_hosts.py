from pathlib import Path

import pytest

from launch.nodes.hosts import Host, check_host_keys, find_hosts


def test_slots_are_those_told_or_as_many_as_ranks() -> None:
    assert find_hosts(["a", "root@b:8"], None, processes=2) == [Host("a", 2), Host("root@b", 8)]


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("# two nodes\n\nworker-1 slots=4  # the first\nworker-2 slots=4\n")
    assert find_hosts([], str(path), processes=1) == [Host("worker-1", 4), Host("worker-2", 4)]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["a", "a"], "a stands there twice"),
        (["a;touch x"], "is no host name"),
        (["-oProxyCommand=x"], "is no host name"),
        (["$(x)"], "is no host name"),
        (["a:0"], "must be NAME or NAME:SLOTS"),
        (["a:b"], "must be NAME or NAME:SLOTS"),
    ],
)
def test_what_is_no_host_is_refused(entries: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="launch.hosts") as caught:
        find_hosts(entries, None, processes=1)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["a slots=x\n", "a slots=0\n", "a gpus=4\n", ""])
def test_a_hostfile_with_other_lines_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(ValueError, match="launch.hostfile"):
        find_hosts([], str(path), processes=1)


def test_a_missing_hostfile_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"launch\.hostfile=.*nowhere can't be read"):
        find_hosts([], str(tmp_path / "nowhere"), processes=1)


def test_hosts_are_named_in_one_place() -> None:
    with pytest.raises(ValueError, match="both are given"):
        check_host_keys(["a"], "file")
    with pytest.raises(ValueError, match="neither is given"):
        check_host_keys([], None)
