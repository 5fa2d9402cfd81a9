import sys
from pathlib import Path

import pytest

from launch import cli
from tests.command import thrifty


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["thrifty", *arguments])
    return cli.main()


def test_without_a_verb_all_verbs_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch) == 0
    printed = capsys.readouterr().out
    assert all(f"  {verb} " in printed for verb in cli.VERBS)


def test_an_unknown_verb_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "evalute") == 2
    assert "did you mean evaluate?" in capsys.readouterr().err


def test_help_lists_groups_with_their_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "train", "--help") == 0
    printed = capsys.readouterr().out
    for line in ("model (default: demo)", "schedule=wsd", "experiment=smoke", "data=files"):
        assert line in printed
    assert "_schema" not in printed


@pytest.mark.parametrize("verb", ["train", "evaluate", "generate"])
def test_cfg_prints_the_config_and_runs_nothing(
    verb: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, verb, "--cfg", "job", "run_dir=here") == 0
    assert "run_dir: here" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_commands_work_from_any_folder_whatever_it_holds(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong train')")
    code, output = thrifty("train", "--cfg", "job", "model.dim=64", cwd=tmp_path)
    assert code == 0, output
    assert "dim: 64" in output


def test_evaluate_without_any_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "evaluate") == 2
    assert "give run_dir=FOLDER" in capsys.readouterr().err
