"""A billion documents cost no memory, and next to no time to begin with."""

import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from data.blend import Blend
from data.documents import DocumentIndex, MappedIndex, Numbers, Spans
from data.mixture import Mixture
from data.packing import Packing
from data.position import Position, SourcePosition
from data.source import Source
from tests.ranks import run_ranks

DOCUMENTS = 10**9
SEQ_LEN = 4096
MIB = 2**20


def draw_mix(index: DocumentIndex, packing: Packing) -> tuple[float, float]:
    """Seconds until the first batch is drawn, and the growth of the peak of memory until many
    are, from places all over the epochs."""
    started = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sources = [Source(name, index, seed=0) for name in ("web", "code")]
    mixture = Mixture(sources, Blend({"web": 2, "code": 1}), seq_len=SEQ_LEN, packing=packing)
    mixture.draw(Position(), 256)
    seconds = time.perf_counter() - started
    for number in range(4):
        start = number * DOCUMENTS // 3 + 17
        at = Position(sources={name: SourcePosition(document=start) for name in ("web", "code")})
        for _ in range(12):
            _, at = mixture.draw(at, 256)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, (after - before) * 1024 / MIB


class ComputedIndex:
    """Documents of 100 to 2099 tokens, without a file."""

    num_documents = DOCUMENTS

    def find(self, documents: Numbers) -> Spans:
        return Spans(documents * 1000, 100 + documents * 7919 % 2000, np.zeros_like(documents))


@pytest.mark.slow
@pytest.mark.parametrize("packing", list(Packing))
def test_drawing_from_a_billion_documents_takes_the_memory_of_a_few_windows(
    packing: Packing,
) -> None:
    ((seconds, grown),) = run_ranks(1, lambda: draw_mix(ComputedIndex(), packing), seconds=300)
    print(f"{packing}: first batch after {seconds:.2f} s, peak {grown:+.0f} MiB")
    assert grown < 50


@pytest.mark.slow
def test_an_index_file_of_a_billion_documents_is_opened_at_once_and_stays_out_of_memory(
    tmp_path: Path,
) -> None:
    if shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("needs 8 GB of disk for the index, and some to spare")
    path = tmp_path / "documents.i64"
    with path.open("wb") as file:
        for first in range(0, DOCUMENTS + 1, 10**7):
            numbers = np.arange(first, min(first + 10**7, DOCUMENTS + 1))
            (numbers * 1000 + numbers * 7919 % 997).tofile(file)
    try:
        ((seconds, grown),) = run_ranks(
            1, lambda: draw_mix(MappedIndex(path, None), Packing.concatenate), seconds=300
        )
    finally:
        path.unlink()
    print(f"file of 8 GB: first batch after {seconds:.2f} s, peak {grown:+.0f} MiB")
    assert grown < 50
