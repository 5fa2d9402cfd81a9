"""The table of rules: what it refuses, and that the way out which it names is one."""

import re
from itertools import product
from typing import Any

import pytest

from launch.pages.layout_page import probe_layout
from model.recompute import Recompute
from train.layout.rules import (
    CHOICES,
    RULES,
    broken_rules,
    check_layout,
    describe_way_out,
    find_way_out,
)


def test_every_choice_of_every_pair_of_settings_is_taken_or_refused_with_a_way_out_that_works() -> (
    None
):
    base = probe_layout()
    for one, other in product(CHOICES, repeat=2):
        values = ((*CHOICES[name](base), base.value(name)) for name in (one, other))
        for first, second in product(*values):
            layout = base.changed({one: first}).changed({other: second})
            for rule in broken_rules(layout)[:1]:
                with pytest.raises(ValueError, match=re.escape(describe_way_out(layout, rule))):
                    check_layout(layout)
                change = find_way_out(layout, rule)
                assert change is not None, f"{rule.settings} of {layout} leaves no way out"
                check_layout(layout.changed(change))


def test_every_rule_names_settings_that_exist() -> None:
    layout = probe_layout()
    for rule in RULES:
        for setting in rule.settings:
            section, _, name = setting.rpartition(".")
            assert hasattr(layout.value(section) if section else layout, name), setting


def test_experts_beyond_the_divisors_have_the_nearest_as_their_way_out() -> None:
    layout = probe_layout().changed({"ranks": 4, "parallel.expert": 3})
    (rule, *_) = broken_rules(layout)
    assert find_way_out(layout, rule) == {"parallel.expert": 2}


@pytest.mark.parametrize(
    "settings",
    [
        {"parallel.recompute": Recompute.selective},
        {"parallel.expert": 2, "model.moe.max_tokens_per_chunk": 16},
    ],
)
def test_what_fails_or_hangs_only_together_with_zero_3_is_refused_there(
    settings: dict[str, Any],
) -> None:
    check_layout(probe_layout().changed(settings | {"parallel.zero_stage": 2}))
    with pytest.raises(ValueError, match=r"parallel.zero_stage=3.* choose parallel"):
        check_layout(probe_layout().changed(settings | {"parallel.zero_stage": 3}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel.expert": 1}, r"overlap_halves=true and .*expert=1 don't go.*; choose parallel"),
        ({"parallel.micro_batch_size": 3}, r"micro_batch_size=3 and .*=true .*size=4 or another"),
        ({"model.moe.max_tokens_per_chunk": 1}, r"per_chunk=1 .*; choose .*overlap_halves=false"),
    ],
)
def test_halves_that_are_none_are_refused(settings: dict[str, Any], message: str) -> None:
    halves = {"parallel.expert": 2, "parallel.micro_batch_size": 2, "parallel.overlap_halves": True}
    check_layout(probe_layout().changed(halves))
    with pytest.raises(ValueError, match=message):
        check_layout(probe_layout().changed(halves | settings))
