"""`thrifty generate` as it is typed, on the folder of a run."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from data.prepare import make_ready
from launch import cli
from tests.command import compose
from tests.ranks import run_ranks
from train.config import CONFIG_FILE, write_config
from train.engine.engine import join
from train.loop import train


class Printed(NamedTuple):
    code: int
    text: str
    errors: str


Generate = Callable[..., Printed]


@pytest.fixture(scope="module")
def run_dir(smoke: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "run"
    config = compose(*smoke, f"run_dir={folder}", "schedule.steps=3", "schedule.warmup_steps=0")
    make_ready(config.data)
    folder.mkdir()
    write_config(config, folder / CONFIG_FILE)
    run_ranks(1, lambda: train(config, join(config.parallel, timeout_minutes=5)).step)
    return folder


@pytest.fixture
def generate(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Generate:
    """`thrifty generate SETTINGS`, in this process, for twelve tokens a prompt."""

    def run(*settings: str) -> Printed:
        common = ("thrifty", "generate", f"run_dir={run_dir}", "max_new_tokens=12")
        monkeypatch.setattr(sys, "argv", [*common, *settings])
        code = cli.main()
        return Printed(code, *capsys.readouterr())

    return run


def test_one_prompt_is_printed_with_its_continuation(generate: Generate) -> None:
    prompt = "a = {'b': \"c, d\"}  # as it is\n"
    printed = generate(f"prompt={prompt}")
    assert printed.code == 0
    assert printed.text.startswith(prompt)
    assert len(printed.text) > len(prompt) + 1
    assert printed.errors == ""


def test_several_prompts_are_lines_of_json_in_their_order(
    generate: Generate, tmp_path: Path
) -> None:
    prompts = ["def ", "x = 1\ny", "import "]
    printed = generate(*(f"prompt={prompt}" for prompt in prompts), "temperature=0")
    rows = [json.loads(line) for line in printed.text.splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    for row in rows:
        single = generate(f"prompt={row['prompt']}", "temperature=0")
        assert single.text == f"{row['prompt']}{row['text']}\n"

    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    assert generate(f"prompts_file={path}", "temperature=0", "batch_size=2").text == printed.text


def test_drafts_end_with_what_they_were_worth(generate: Generate) -> None:
    plain = generate("prompt=def ", "prompt=class ")
    drafted = generate("prompt=def ", "prompt=class ", "draft=true")
    assert drafted.text == plain.text
    assert plain.errors == ""
    found = re.fullmatch(
        r"drafts accepted (\d+\.\d)% \((\d+) of (\d+)\), (\d\.\d\d) tokens per forward pass\n",
        drafted.errors,
    )
    assert found is not None, drafted.errors
    rate, accepted, drafts, tokens_per_pass = map(float, found.groups())
    assert rate == pytest.approx(100 * accepted / drafts, abs=0.05)
    assert 1 <= tokens_per_pass <= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["prompt=a", "prompts_file=b.txt"], "exclude each other"),
        (["prompts_file=/nowhere.txt"], "No such file or directory: '/nowhere.txt'"),
        (["top_k=0"], "top_k=0 must be at least 1"),
        (["promt=a"], "did you mean prompts?"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    settings: list[str], message: str, generate: Generate, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        printed = generate(*settings)
    except SystemExit as ended:  # a mistake that Hydra finds
        printed = Printed(int(str(ended.code)), *capsys.readouterr())
    assert printed.code == 2
    assert printed.text == ""
    assert message in printed.errors
    assert len(printed.errors.splitlines()) == 1
