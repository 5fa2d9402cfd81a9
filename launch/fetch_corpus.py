"""`make corpus`: real text in two languages and code, as three prepared corpora of one tokenizer.

English and German: LibreOffice's help, from Debian's packages. Code: SymPy's source, from Python's
package index. `apt-get` and `pip` fetch them from wherever this machine is set up to; `apt-get
download` needs neither root nor an installation.

    FOLDER/packages/              what was fetched; nothing is fetched twice
    FOLDER/english.jsonl ...      a page or a module per line
    FOLDER/tokenizer.model        trained on a sample of all three
    FOLDER/english/ ...           prepared corpora, for data=mixture (see docs/real_text.md)
"""

import json
import logging
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

from data.atomic_file import write_aside
from data.config import FilesData
from data.prepare import prepare
from data.report import describe_sources
from data.tokenizer import TokenizerConfig
from data.train_tokenizer import sample_passages, train_tokenizer

log = logging.getLogger(__name__)

FOLDER = Path("corpora/real")
HELP = {"english": "libreoffice-help-en-us", "german": "libreoffice-help-de"}
DEBUG = "Help content debug info:"  # at the end of every English page
CODE = "sympy==1.14.0"
MAX_MODULE_BYTES = 20_000  # a few generated modules are most of SymPy
TOKENIZER = TokenizerConfig(vocab_size=8192, train_bytes=3_000_000)


class HelpPage(HTMLParser):
    """The headings and paragraphs of a page of LibreOffice's help."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("h1", "h2", "h3", "h4", "h5", "h6") or (
            tag == "p" and dict(attrs).get("class") in ("paragraph", "tablecontent", "tip", "note")
        ):
            self._open = [""]

    def handle_endtag(self, tag: str) -> None:
        if self._open and (tag == "p" or tag[0] == "h"):
            text = " ".join("".join(self._open).split())
            if text and text != DEBUG:
                self.paragraphs.append(text)
            self._open = []

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open.append(data)


def fetch(folder: Path) -> None:
    """Leaves the three packages in the folder.

    Raises:
        ValueError: A package can't be had here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in HELP.values():
        if not any(folder.glob(f"{package}_*.deb")):
            _run(["apt-get", "download", package], folder)
    if not any(folder.glob(f"{CODE.split('==')[0]}-*.whl")):
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", CODE], folder)


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"{' '.join(command)}: {error}; put the package into {folder} by hand, and run again"
        ) from error


def read_help(packages: Path, package: str) -> Iterator[str]:
    """The text of each page of a package of LibreOffice's help."""
    unpacked = packages / package
    if not unpacked.is_dir():
        (archive,) = packages.glob(f"{package}_*.deb")
        _run(["dpkg-deb", "-x", archive.name, package], packages)
    for path in sorted(unpacked.rglob("text/**/*.html")):
        page = HelpPage()
        page.feed(path.read_text(encoding="utf-8"))
        yield "\n".join(page.paragraphs)


def read_code(packages: Path) -> Iterator[str]:
    """The source of each module of the wheel."""
    (wheel,) = packages.glob(f"{CODE.split('==')[0]}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for about in sorted(archive.infolist(), key=lambda about: about.filename):
            is_test = "/tests/" in about.filename
            is_small = about.file_size <= MAX_MODULE_BYTES
            if about.filename.endswith(".py") and is_small and not is_test:
                yield archive.read(about).decode()


def main() -> int:
    """Fetch, prepare and tell how large the corpora are."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    packages = FOLDER / "packages"
    fetch(packages)
    readers: dict[str, Callable[[], Iterator[str]]] = {
        name: lambda package=package: read_help(packages, package) for name, package in HELP.items()
    } | {"code": lambda: read_code(packages)}
    texts = {name: [text for text in read() if text] for name, read in readers.items()}
    for name, documents in texts.items():
        with write_aside(FOLDER / f"{name}.jsonl") as file:
            for text in documents:
                file.write(json.dumps({"text": text}).encode() + b"\n")
    tokenizer = FOLDER / "tokenizer.model"
    if not tokenizer.is_file():
        every = (text for documents in texts.values() for text in documents)
        train_tokenizer(
            sample_passages(every, max_bytes=TOKENIZER.train_bytes), TOKENIZER, tokenizer
        )
    for name in texts:
        prepare(
            FilesData(
                folder=str(FOLDER / name),
                paths=[str(FOLDER / f"{name}.jsonl")],
                tokenizer=TokenizerConfig(path=str(tokenizer)),
                validation_fraction=0.03,
            )
        )
    print(describe_sources({name: FOLDER / name for name in texts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
