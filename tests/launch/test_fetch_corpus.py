"""What `make corpus` makes of packages; fetching them is left to apt-get and pip."""

import zipfile
from pathlib import Path

import pytest

from launch.fetch_corpus import CODE, HelpPage, fetch, read_code, read_help

PAGE = """<html><head><title>Menu</title><script>var x = 1;</script></head><body>
<p dir="auto">Help</p><div id="DisplayArea"><h1 id="a">Paste &amp; <em>go</em></h1>
<p class="paragraph">One  <span class="emph">two</span>
 three.</p><p class="paragraph"> </p><p class="tip">A tip</p>
<p class="paragraph">Help content debug info:</p></div></body></html>"""


def test_a_page_of_help_is_its_headings_and_paragraphs() -> None:
    page = HelpPage()
    page.feed(PAGE)
    assert page.paragraphs == ["Paste & go", "One two three.", "A tip"]


def test_what_lies_in_the_folder_is_read_and_not_fetched(tmp_path: Path) -> None:
    for package in ("libreoffice-help-de", "libreoffice-help-en-us"):
        (tmp_path / f"{package}_1_all.deb").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / f"{CODE.replace('==', '-')}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sympy/core.py", "x = 1\n")
        wheel.writestr("sympy/tests/test_core.py", "assert x == 1\n")
        wheel.writestr("sympy/large.py", "x" * 20_001)
    fetch(tmp_path)
    assert list(read_code(tmp_path)) == ["x = 1\n"]
    pages = tmp_path / "libreoffice-help-de" / "usr" / "text" / "shared"
    pages.mkdir(parents=True)
    (pages / "a.html").write_text(PAGE)
    assert list(read_help(tmp_path, "libreoffice-help-de")) == ["Paste & go\nOne two three.\nA tip"]


def test_a_package_that_cannot_be_had_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"apt-get download libreoffice-help-en-us: .*by hand"):
        fetch(tmp_path)
