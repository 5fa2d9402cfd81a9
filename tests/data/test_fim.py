"""Fill in the middle loses no token, happens as often as asked, and depends on nothing else."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.fim import Fim, FimConfig, FimMode, FimSetting, Part, check_fim
from data.tokenizer import FimIds

IDS = FimIds(prefix=1001, suffix=1002, middle=1003)


def read(parts: list[Part], stored: list[int]) -> list[int]:
    """The document as it is read."""
    tokens: list[int] = []
    for part in parts:
        tokens += [part] if isinstance(part, int) else stored[slice(*part)]
    return tokens


def reassemble(tokens: list[int]) -> list[int]:
    """The text of a rearranged document, by its markers alone."""
    begin, hole, end = (tokens.index(marker) for marker in IDS)
    before, after = tokens[:begin], tokens[end + 1 :]
    if hole == begin + 1:  # SPM: the suffix comes first, then prefix and middle in one
        return [*before, *after, *tokens[hole + 1 : end]]
    return [*before, *tokens[begin + 1 : hole], *after, *tokens[hole + 1 : end]]


@settings(max_examples=300, deadline=None)
@given(
    size=st.integers(0, 60),
    has_bos=st.booleans(),
    has_eos=st.booleans(),
    mode=st.sampled_from(list(FimMode)),
    document=st.integers(0, 2**40),
)
def test_every_rearranged_document_comes_together_again(
    size: int, has_bos: bool, has_eos: bool, mode: FimMode, document: int
) -> None:
    stored = [5000] * has_bos + list(range(size)) + [6000] * has_eos
    fim = Fim(FimSetting(1.0, mode), IDS, key=b"key")
    parts = fim.arrange(document, int(has_bos), int(has_bos) + size, len(stored))
    tokens = read(parts, stored)
    assert len(tokens) == len(stored) + 3
    assert sorted(token for token in tokens if token in IDS) == list(IDS)
    assert tokens[:1] == ([5000] if has_bos else [IDS.prefix])
    if has_eos:
        assert tokens.pop() == stored.pop() == 6000
    assert reassemble(tokens) == stored


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_rate_is_met_within_its_confidence_interval(rate: float) -> None:
    count = 100_000
    fim = Fim(FimSetting(rate, FimMode.psm), IDS, key=b"rate")
    found = fim.are_chosen(np.arange(count)).mean()
    assert abs(found - rate) < 3.3 * math.sqrt(rate * (1 - rate) / count)  # 99.9 %


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_rate_of_none_or_all_is_exact(rate: float) -> None:
    fim = Fim(FimSetting(rate, FimMode.psm), IDS, key=b"rate")
    assert fim.are_chosen(np.arange(10_000)).mean() == rate


@pytest.mark.parametrize(("mode", "share"), [("psm", 0.0), ("spm", 1.0), ("mix", 0.5)])
def test_the_mode_decides_the_order_of_the_parts(mode: str, share: float) -> None:
    fim = Fim(FimSetting(1.0, FimMode(mode)), IDS, key=b"mode")
    count = 4000
    spm = sum(fim.arrange(number, 1, 50, 51)[2] == IDS.suffix for number in range(count))
    assert abs(spm / count - share) <= 3.3 * math.sqrt(share * (1 - share) / count)


def test_cuts_fall_evenly_over_the_text() -> None:
    fim = Fim(FimSetting(1.0, FimMode.psm), IDS, key=b"cuts")
    counts = np.zeros(11, np.int64)
    for number in range(11_000):
        _, _, (_, first), _, (last, _), *_ = fim.arrange(number, 1, 11, 12)
        counts[first - 1] += 1
        counts[last - 1] += 1
    assert counts.sum() == 22_000
    assert abs(counts - 2000).max() < 5 * math.sqrt(2000)


def test_the_choice_depends_on_key_and_document_alone() -> None:
    documents = np.arange(1000)
    one = Fim(FimSetting(0.5, FimMode.mix), IDS, key=b"fim 0 web 0")
    same = Fim(FimSetting(0.5, FimMode.mix), IDS, key=b"fim 0 web 0")
    other = Fim(FimSetting(0.5, FimMode.mix), IDS, key=b"fim 0 web 1")  # the next epoch
    assert (one.are_chosen(documents) == same.are_chosen(documents[::-1])[::-1]).all()
    assert 400 < (one.are_chosen(documents) == other.are_chosen(documents)).sum() < 600
    assert one.arrange(7, 0, 90, 90) == same.arrange(7, 0, 90, 90) != other.arrange(7, 0, 90, 90)


def test_a_rate_that_is_no_share_is_refused() -> None:
    for rate in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"data\.fim\.rate={rate} must lie in \[0, 1\]"):
            check_fim(FimConfig(rate=rate))
