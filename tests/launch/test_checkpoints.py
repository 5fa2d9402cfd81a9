"""`thrifty checkpoints ACTION`, on a small run's folder."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from data.prepare import prepare, tokenizer_path
from data.tokenizer import load_tokenizer
from launch.checkpoints import main
from tests.train.random_run import random_state
from tests.train.tiny import tiny_model, tiny_run
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.manifest import Fragment, Measured
from train.checkpoint.stored_tensors import open_checkpoint
from train.config import CONFIG_FILE, RunConfig, describe_config, write_config
from train.evaluate_run import EvaluateConfig, evaluate_run
from train.outcome import ExitCode
from train.ranks import alone

NAME = "weight/layers.1.ffn.experts.up"


def checkpoints(*arguments: str) -> ExitCode:
    with mock.patch.object(sys, "argv", ["thrifty checkpoints", *arguments]):
        return main()


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """Steps 1 to 3 of random weights; step 2 was evaluated."""
    config = tiny_run(tmp_path)
    prepare(config.data)
    Path(config.run_dir).mkdir()
    write_config(config, Path(config.run_dir) / CONFIG_FILE)
    for step in (1, 2, 3):
        state = random_state(tiny_model())
        fragments = [Fragment(n, tuple(v.shape), 0, v.flatten()) for n, v in state.items()]
        about = {
            "progress": {"step": step},
            "tokens": 1000 * step,
            "loss": 5.0 / step,
            "evaluation": Measured(2, 4.25) if step == 2 else None,
            "tokenizer": load_tokenizer(tokenizer_path(config.data)).fingerprint,
            "layout": {"ranks": 2},
            "versions": {},
            "config": describe_config(replace(config, seed=step)),
        }
        Checkpoints(Path(config.run_dir), keep=9).save(step, fragments, ranks=alone(), about=about)
    return config


def test_list_and_verify_show_numbers_and_health(
    run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoints("list", f"run_dir={run.run_dir}") == ExitCode.FINISHED
    lines = capsys.readouterr().out.splitlines()
    (second,) = [line for line in lines if "2,000" in line]
    assert "2.5000" in second
    assert "4.2500" in second
    assert "good (fast)" in second
    path = Checkpoints(Path(run.run_dir)).path(3) / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    assert checkpoints("list", f"run_dir={run.run_dir}") == ExitCode.FINISHED
    assert checkpoints("verify", f"run_dir={run.run_dir}") == ExitCode.FAILED
    assert "has changed" in capsys.readouterr().out


def test_show_is_json_of_one_manifest(run: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoints("show", f"run_dir={run.run_dir}", "step=2") == ExitCode.FINISHED
    values = json.loads(capsys.readouterr().out)
    assert (values["step"], values["tokens"], values["files"]) == (2, 2000, 1)


def test_diff_tells_keys_and_each_components_distance(
    run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoints("diff", f"run_dir={run.run_dir}", "step=1", "other_step=3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "config    seed: 1 -> 3" in lines
    (line,) = [line for line in lines if line.endswith(" weight/embed.weight")]
    one, other = (
        open_checkpoint(Path(run.run_dir), step=step).read(
            "weight/embed.weight", start=0, shape=(512, 32)
        )
        for step in (1, 3)
    )
    expected = ((other - one).norm() / one.norm()).item()
    assert float(line.split()[0]) == pytest.approx(expected, rel=1e-2)
    assert checkpoints("diff", f"run_dir={run.run_dir}", "step=1", "other_step=1") == 0
    zero = [line for line in capsys.readouterr().out.splitlines() if "weight/" in line]
    assert all(line.split()[0] == "0.00e+00" for line in zero)


def test_the_average_is_the_mean_and_can_be_evaluated(run: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "mean"
    settings = (f"run_dir={run.run_dir}", "steps=[1,2,3]", f"out={out}")
    assert checkpoints("average", *settings) == ExitCode.FINISHED
    stored = [open_checkpoint(Path(run.run_dir), step=step) for step in (1, 2, 3)]
    parts = [one.read(NAME, start=0, shape=(8, 16, 32)) for one in stored]
    got = open_checkpoint(out, step=None).read(NAME, start=0, shape=(8, 16, 32))
    torch.testing.assert_close(got, torch.stack(parts).mean(0))
    assert evaluate_run(EvaluateConfig(run_dir=str(out), max_sequences=4)).loss > 0
    assert checkpoints("average", *settings) == ExitCode.MISTAKE, "out holds a run now"


def test_a_run_is_judged_by_another_corpus_if_asked(run: RunConfig, tmp_path: Path) -> None:
    own = EvaluateConfig(run_dir=run.run_dir, max_sequences=4)
    expected = evaluate_run(own)
    shutil.copytree(run.data.folder, tmp_path / "other")
    (Path(run.data.folder) / "manifest.json").unlink()
    assert evaluate_run(replace(own, corpus=str(tmp_path / "other"))) == expected
    with pytest.raises(ValueError, match="holds no finished corpus"):
        evaluate_run(own)


def test_a_step_without_checkpoint_is_a_mistake(
    run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoints("show", f"run_dir={run.run_dir}", "step=9") == ExitCode.MISTAKE
    assert "step=9 has no checkpoint" in capsys.readouterr().err
