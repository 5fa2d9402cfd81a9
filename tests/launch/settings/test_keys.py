from dataclasses import dataclass

import pytest

from launch.pages import layout_costs, layout_page
from launch.pages.reference import PAGE, write_reference
from launch.settings.config import LaunchedRun
from launch.settings.keys import Key, list_keys, read_comments
from train.schedule import CosineSchedule


@dataclass(slots=True, kw_only=True)
class Sample:
    #: A width,
    #: over two lines.
    dim: int
    ratio: float | None = None
    steps: int = 0
    is_causal: bool = False


def test_keys_carry_type_default_and_comment() -> None:
    assert list(list_keys(Sample)) == [
        Key("dim", "int", None, "A width, over two lines.", ()),
        Key("ratio", "float | null", "null", "", ()),
        Key("steps", "int", "0", "", ()),
        Key("is_causal", "bool", "false", "", ()),
    ]


def test_a_kinds_own_keys_name_their_kinds() -> None:
    keys = {(key.name, key.options) for key in list_keys(LaunchedRun)}
    assert ("schedule.constant_steps", ("cosine",)) in keys
    assert ("schedule.steps", ()) in keys


def test_comments_of_bases_are_inherited() -> None:
    assert read_comments(CosineSchedule)["peak_lr"] == "Highest learning rate."


def test_every_key_but_the_kinds_is_explained() -> None:
    unexplained = [key.name for key in list_keys(LaunchedRun) if not key.comment]
    assert [name for name in unexplained if not name.endswith(".kind")] == []


def test_the_committed_reference_is_what_the_code_says() -> None:
    assert PAGE.read_text() == write_reference(), "run `make docs` and commit docs/configs.md"
    page = layout_page.PAGE
    assert page.read_text() == layout_page.write_page(), f"run `make docs` and commit {page}"


@pytest.mark.slow
def test_the_costs_of_layouts_in_the_docs_are_what_the_code_says() -> None:
    page = layout_costs.PAGE.read_text()
    assert page == layout_costs.write_page(page), f"run `make docs` and commit {layout_costs.PAGE}"
