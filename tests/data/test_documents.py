"""The index tells the same of a document whether it is mapped or read."""

import os
from pathlib import Path

import numpy as np
import pytest

from data import documents
from data.documents import MappedIndex


def test_a_large_index_is_read_as_a_small_one_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = np.arange(1, 1001) * 7 % 40 + 2
    starts, prompts = tmp_path / "starts", tmp_path / "prompts"
    np.append(0, np.cumsum(lengths)).astype("<i8").tofile(starts)
    (lengths // 2).astype("<i4").tofile(prompts)
    wanted = np.array([0, 999, 17, 17, 500])
    small = MappedIndex(starts, prompts).find(wanted)
    monkeypatch.setattr(documents, "KEEP_MAPPED", 0)
    large = MappedIndex(starts, prompts).find(wanted)
    for one, other in zip(small, large, strict=True):
        assert one.tolist() == other.tolist()
    assert large.lengths.tolist() == lengths[wanted].tolist()
    assert large.prompts.tolist() == (lengths[wanted] // 2).tolist()
    assert MappedIndex(starts, None).find(wanted).prompts.tolist() == [0] * 5


def test_a_large_index_that_was_cut_short_is_an_error_and_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "KEEP_MAPPED", 0)
    starts = tmp_path / "starts"
    np.arange(100).astype("<i8").tofile(starts)
    index = MappedIndex(starts, None)
    os.truncate(starts, 8 * 51 + 4)
    assert index.find(np.array([49])).starts.tolist() == [49]
    with pytest.raises(OSError, match="starts is shorter than it was"):
        index.find(np.array([49, 50]))
