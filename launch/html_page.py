"""A page that needs nothing but itself: HTML with its own style, bars as inline SVG."""

import html
from collections.abc import Mapping, Sequence

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; color: #222 }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6em; margin: 0 }
.hidden { color: #999 } .border { margin: .8em 0 .1em; color: #666; font-size: 13px }
table { border-collapse: collapse } td, th { padding: .1em 1em .1em 0; text-align: right }
td:first-child, th:first-child { text-align: left } svg text { font-size: 12px }
"""
BAR_HEIGHT, LABEL_WIDTH, BAR_WIDTH, WIDTH = 20, 150, 420, 760


def write_html(title: str, body: str) -> str:
    """The page's text."""
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{body}</table>"


def bars(values: Mapping[str, float], *, form: str = "{:,.0f}") -> str:
    """A bar for each value, the longest as wide as can be."""
    most = max(values.values(), default=0) or 1
    parts = []
    for number, (label, value) in enumerate(values.items()):
        top = number * BAR_HEIGHT
        width = max(value / most, 0) * BAR_WIDTH
        parts.append(
            f'<text x="{LABEL_WIDTH - 8}" y="{top + 14}" text-anchor="end">{html.escape(label)}'
            f'</text><rect x="{LABEL_WIDTH}" y="{top + 3}" width="{width:.1f}" height="14" '
            f'fill="#4878a8"/><text x="{LABEL_WIDTH + width + 6:.1f}" y="{top + 14}">'
            f"{form.format(value)}</text>"
        )
    height = BAR_HEIGHT * len(values)
    return f'<svg width="{WIDTH}" height="{height}">{"".join(parts)}</svg>'
