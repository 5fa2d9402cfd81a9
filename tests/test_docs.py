"""Commands in README and docs are commands that exist, with settings that exist."""

import re
import shlex
from pathlib import Path

import pytest

from data.samples import IGNORED as IGNORED_IN_DATA
from launch.cli import VERBS
from model.loss import IGNORED as IGNORED_IN_MODEL
from tests.command import compose

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted(
    {
        line.strip()
        for page in PAGES
        for line in page.read_text().replace("\\\n", " ").splitlines()
        if re.match(r" *thrifty [a-z]+", line)
    }
)
TARGETS = sorted(
    {name for page in PAGES for name in re.findall(r"(?m)(?:`|^)make ([a-z-]+)", page.read_text())}
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_in_the_docs_exists_and_composes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, verb, *settings = shlex.split(command, comments=True)
    assert verb in VERBS
    monkeypatch.chdir(tmp_path)
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == "data.tokenizer.path":  # must be a file, whatever it holds
            Path(value).parent.mkdir(parents=True)
            Path(value).touch()
    if verb == "train" and not {"-m", "--cfg", "--help"} & set(settings):
        compose(*settings)


@pytest.mark.parametrize("target", TARGETS)
def test_a_make_target_in_the_docs_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_data_and_model_mean_the_same_by_an_ignored_target() -> None:
    assert IGNORED_IN_DATA == IGNORED_IN_MODEL
