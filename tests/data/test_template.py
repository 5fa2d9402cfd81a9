"""Templates put columns together and can do nothing else."""

import pytest

from data.template import parse_template


def test_columns_fill_their_places() -> None:
    template = parse_template("{title}\n{{{body}}} {title}", key="data.template")
    assert template.columns == ["title", "body"]
    assert template.fill({"title": "T", "body": None, "other": 1}) == "T\n{} T"
    assert template.fill({"title": 3, "body": "{title}"}) == "3\n{{title}} 3"


@pytest.mark.parametrize(
    "text", ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{0}", "{a", "a}", "plain", ""]
)
def test_what_is_more_than_a_column_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"data\.template=.* should name columns in braces"):
        parse_template(text, key="data.template")


def test_a_value_that_is_no_text_is_refused() -> None:
    with pytest.raises(TypeError, match="a holds list"):
        parse_template("{a}", key="data.template").fill({"a": []})
