"""Progress is shown with rate and remaining time, on a terminal and in a log file."""

import io

import pytest
from rich.console import Console

from data.progress import LineProgress, TerminalProgress


def test_lines_tell_share_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.progress.SECONDS_BETWEEN_LINES", 0.0)
    stream = io.StringIO()
    with LineProgress(stream).stage("tokenize", total_bytes=4_000_000) as advance:
        advance(1_000_000)
    first, second, last = stream.getvalue().splitlines()
    assert first == "tokenize ..."
    assert second.startswith("tokenize: 1.0 MB, ")
    assert "MB/s, 25%, about " in second
    assert last.startswith("tokenize: 1.0 MB in ")


def test_lines_do_without_a_total(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.progress.SECONDS_BETWEEN_LINES", 0.0)
    stream = io.StringIO()
    with LineProgress(stream).stage("tokenize", total_bytes=None) as advance:
        advance(1_000_000)
    assert "left" not in stream.getvalue()


def test_a_terminal_shows_a_bar() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with TerminalProgress(console).stage("tokenize", total_bytes=4_000_000) as advance:
        advance(4_000_000)
    assert "tokenize" in stream.getvalue()
    assert "4.0/4.0 MB" in stream.getvalue()
