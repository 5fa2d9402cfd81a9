"""Stretches of mapped files arrive whole and in order, or as an error."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from data.gather import MOST_AT_ONCE, Gather


def test_stretches_arrive_one_after_another_however_many_and_large() -> None:
    gather = Gather()
    for count, size in [(3, 5), (2 * MOST_AT_ONCE + 7, 11), (1, 300_000), (2, 0)]:
        stretches = [np.arange(size, dtype=np.uint16) + number for number in range(count)]
        assert gather(stretches).tolist() == np.concatenate(stretches).tolist()


def test_a_mapped_file_that_was_cut_short_is_an_error_and_not_the_end_of_the_process(
    tmp_path: Path,
) -> None:
    path = tmp_path / "tokens.bin"
    np.arange(100_000, dtype=np.uint16).tofile(path)
    with path.open("r+b") as file:
        tokens = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint16)
        file.truncate(8192)
    gather = Gather()
    assert gather([tokens[:4096]]).tolist() == list(range(4096))
    for stretch in (tokens[50_000:50_010], tokens[4000:5000]):
        with pytest.raises(OSError, match="Bad address|shorter"):
            gather([tokens[:10], stretch])
