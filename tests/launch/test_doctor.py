"""What the doctor makes of nodes' answers. (tests/cluster/test_doctor.py asks real ones.)"""

import threading
import time
from pathlib import Path

import pytest

from launch.doctor import PROBE_SECONDS, judge_corpora, judge_devices
from launch.fitness.findings import Findings, report
from launch.fitness.probe import URL_SECONDS, list_gpus, look_at_corpora, resolve
from launch.fitness.rates import GB, describe_rates, list_rates
from launch.settings.config import LaunchedRun
from tests.command import compose
from tests.data.web_server import serve

RATES = {
    "all_reduce": 2 * GB,
    "all_to_all": 3 * GB,
    "pairs": {
        "0-1": {"all_reduce": 5 * GB, "all_to_all": 6 * GB},
        "0-2": {"all_reduce": 4 * GB, "all_to_all": 1 * GB},
        "1-2": {"all_reduce": 5 * GB, "all_to_all": 5 * GB},
    },
}


@pytest.fixture(scope="module")
def config() -> LaunchedRun:
    return compose("experiment=smoke", "launch=ssh", "launch.hosts=[a,b,c]", "launch.processes=2")


@pytest.mark.parametrize(
    ("odd", "check", "problem"),
    [
        ({"gpus": ["H100"]}, "GPUs", "1 GPUs, 2 needed"),
        ({"gpus": ["A100", "A100"]}, "kind of GPU", "A100, others have H100"),
        ({"driver": "535.1"}, "driver", "535.1, others have 550.2"),
        ({"gpus": [], "driver": "none"}, "driver", "none, others have 550.2"),
    ],
)
def test_a_node_with_other_gpus_or_another_driver_is_red(
    config: LaunchedRun, odd: dict[str, object], check: str, problem: str
) -> None:
    same = {"gpus": ["H100", "H100"], "driver": "550.2"}
    findings = Findings(["a", "b", "c"])
    judge_devices(findings, config, {"a": same, "b": {**same, **odd}, "c": same})
    red = [finding for finding in findings.findings if not finding.is_good]
    assert (check, "b", problem) in [(one.check, one.host, one.text) for one in red]
    assert {one.host for one in red} == {"b"}
    assert all(one.way_out for one in red)


def test_nodes_without_gpus_are_green(config: LaunchedRun) -> None:
    findings = Findings(["a", "b"])
    none = {"gpus": [], "driver": "none"}
    judge_devices(findings, config, {"a": none, "b": none})
    assert findings.is_healthy


def test_gpus_are_those_that_nvidia_smi_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 80GB, 550.2'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_gpus() == [("NVIDIA H100, 80GB", "550.2")]
    tool.unlink()
    assert list_gpus() == []


def test_a_name_on_the_loopback_is_no_place_to_meet() -> None:
    assert resolve("127.0.1.1")["problem"] == "127.0.1.1 is 127.0.1.1 here, the loopback"
    assert resolve("192.0.2.1")["problem"] == ""


def test_brackets_in_what_a_node_says_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    problem = "RuntimeError: [/pytorch/third_party/gloo/pair.cc:144] [node1] refused"
    findings = Findings(["[::1]"])
    findings.add("network", "[::1]", problem, "", "open [ports] between the nodes")
    report(findings)
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1] == f"[::1]: network: {problem}; open [ports] between the nodes"
    assert any(problem in line for line in shown[:-1]), "in the table"


def test_rates_are_told_for_the_group_and_each_pair_and_the_slowest_link_is_named() -> None:
    hosts = ["a", "b", "c"]
    assert list_rates(RATES, hosts) == [
        "all nodes: all-reduce 2.00 GB/s, all-to-all 3.00 GB/s",
        "slowest link a - c",
        "  a - c: all-reduce 4.00 GB/s, all-to-all 1.00 GB/s",
        "  a - b: all-reduce 5.00 GB/s, all-to-all 6.00 GB/s",
        "  b - c: all-reduce 5.00 GB/s, all-to-all 5.00 GB/s",
    ]
    assert list(describe_rates(RATES, hosts, 2.0)) == [
        ("a", "1.00 GB/s to c", "1.00 GB/s to c, 2 needed"),
        ("b", "5.00 GB/s to a", ""),
        ("c", "1.00 GB/s to a", "1.00 GB/s to a, 2 needed"),
    ]


def test_a_corpus_behind_a_url_counts_as_missing_where_it_cant_be_reached(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with serve(tmp_path) as server:
        found = look_at_corpora([server.url])
        assert found == look_at_corpora([str(tmp_path)])
        assert found.digest != "missing"
        server.stop()
        found = look_at_corpora([server.url, str(tmp_path)])
    assert found.digest == "missing"
    assert list(found.unread) == [server.url]
    assert f"{server.url}/manifest.json" in found.unread[server.url]


def test_urls_are_asked_together_so_that_silent_ones_cost_no_more_than_one(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        server.gate.clear()

        def answer_all() -> None:
            while server.most_at_once < 4:
                time.sleep(0.01)
            server.gate.set()

        threading.Thread(target=answer_all, daemon=True).start()
        urls = [f"{server.url}/{name}" for name in "abcd"]
        assert list(look_at_corpora(urls).unread) == urls
    assert server.most_at_once == 4
    assert URL_SECONDS < PROBE_SECONDS / 2, "the rest of a node's answer has time left"


def test_the_way_out_for_a_corpus_is_to_reach_its_url_or_to_put_it_there(
    config: LaunchedRun,
) -> None:
    url, folder = "s3://bucket/web", "/data/qa"
    good = {"digest": "abc", "unread": {}}
    bad = {"digest": "missing", "unread": {url: f"{url}: refused", folder: "no such file"}}
    findings = Findings(["a", "b"])
    judge_corpora(findings, config, {"a": {"corpora": good}, "b": {"corpora": bad}})
    red = [finding for finding in findings.findings if not finding.is_good]
    assert [(one.host, one.text) for one in red] == [
        ("b", f"{url}: refused"),
        ("b", "no such file"),
    ]
    assert red[0].way_out.startswith(f"let the node reach {url}: network")
    assert red[1].way_out == f"put the prepared corpus into {folder} there"
