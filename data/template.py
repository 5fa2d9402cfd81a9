"""Texts out of several columns: "{title}\\n\\n{body}", and nothing but that.

A template names columns in braces; `{{` and `}}` are braces. Whatever else Python's formatting
knows (attributes, items, conversions, formats) is refused, so that a template can't reach anything
but the row's values.
"""

from dataclasses import dataclass
from string import Formatter
from typing import Any


@dataclass(slots=True, frozen=True)
class Template:
    """Literal text and column names, in turn."""

    parts: tuple[tuple[str, str | None], ...]  # text, and the column after it if there is one

    @property
    def columns(self) -> list[str]:
        """The columns that are named, each once, in order."""
        return list(dict.fromkeys(column for _, column in self.parts if column is not None))

    def fill(self, row: dict[str, Any]) -> str:
        """The text with the row's values; a null is empty.

        Raises:
            TypeError: A value is neither a string nor a number.
        """
        pieces = []
        for text, column in self.parts:
            pieces.append(text)
            if column is not None:
                value = row[column]
                if not isinstance(value, str | int | float | None):
                    raise TypeError(f"{column} holds {type(value).__name__}")
                pieces.append("" if value is None else str(value))
        return "".join(pieces)


def parse_template(text: str, *, key: str) -> Template:
    """The template in `text`; `key` is its setting's name, for complaints.

    Raises:
        ValueError: A brace without its partner, or more than a column's name in braces.
    """
    parts: list[tuple[str, str | None]] = []
    rule = f"{key}={text!r} should name columns in braces, as in '{{title}}: {{body}}'"
    try:
        for literal, column, spec, conversion in Formatter().parse(text):
            if column is not None and (spec or conversion or not column.isidentifier()):
                raise ValueError(f"{{{column}}} is no plain column name")
            parts.append((literal, column))
    except ValueError as error:
        raise ValueError(f"{rule}: {error}; write {{{{ and }}}} for braces of the text") from error
    template = Template(tuple(parts))
    if not template.columns:
        raise ValueError(f"{rule}: it names none; name at least one")
    return template
