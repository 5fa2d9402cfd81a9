"""The moving average of the weights, against a loop, and through a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.train.hub.families import FAMILIES
from tests.train.random_run import random_run, random_state
from tests.train.tiny import tiny_run
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.manifest import Fragment
from train.checkpoint.stored_tensors import StoredTensors
from train.config import RunConfig
from train.ema import EMA, EMAConfig, Weights, check_ema, ema_name
from train.engine.engine import join
from train.evaluate_run import EvaluateConfig, evaluate_run
from train.generate import GenerateConfig, Writer
from train.hub.export import ExportConfig, export
from train.layout.parallel import ParallelConfig
from train.loop import train as train_run
from train.ranks import alone


@pytest.mark.parametrize("every", [1, 3])
def test_the_average_is_the_recurrence(every: int) -> None:
    weight = torch.randn(50)
    fragments = [
        Fragment("weight/a", (50,), 0, weight),
        Fragment("exp_avg/a", (50,), 0, torch.randn(50)),
    ]
    ema = EMA(EMAConfig(decay=0.9, every=every), fragments)
    expected = weight.double().clone()
    for updates in range(1, 10):
        weight += torch.randn(50)
        ema.update(fragments, updates=updates)
        if updates % every == 0:
            expected = 0.9**every * expected + (1 - 0.9**every) * weight.double()
    (average,) = ema.fragments()
    assert average.name == "ema/a"
    torch.testing.assert_close(average.data.double(), expected, rtol=1e-5, atol=1e-6)


def start(config: RunConfig, num_ranks: int) -> None:
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    run_ranks(num_ranks, lambda: train_run(config, join(config.parallel, timeout_minutes=5)).step)


def read(config: RunConfig, step: int, kind: str) -> dict[str, torch.Tensor]:
    checkpoints = Checkpoints(Path(config.run_dir))
    manifest = checkpoints.choose(alone(), step=step)
    stored = StoredTensors(checkpoints.path(step), manifest)
    return {
        name.split("/", 1)[1]: stored.read(name, start=0, shape=manifest.tensors[name].shape)
        for name in manifest.tensors
        if name.startswith(kind)
    }


def test_an_average_goes_on_over_a_restart_with_other_ranks(corpus: Path, tmp_path: Path) -> None:
    """Two ranks with EP 2 for two steps, then one rank: against the weights of each step."""
    parallel = ParallelConfig(expert=2, micro_batch_size=4)
    config = tiny_run(tmp_path, parallel=parallel, ema=EMAConfig(decay=0.5))
    config.data.folder = str(corpus)
    config.checkpoint.every = 1
    config.schedule.steps = 2
    start(config, 2)
    config.parallel.expert = 1
    config.schedule.steps = 4
    start(config, 1)
    average = read(config, 4, "ema/")
    assert average.keys() == read(config, 4, "weight/").keys()
    assert (
        "ema-00000.safetensors" in Checkpoints(Path(config.run_dir)).choose(alone(), step=4).files
    )
    expected = read(config, 1, "ema/")
    for step in (2, 3, 4):
        for name, weight in read(config, step, "weight/").items():
            expected[name] = 0.5 * expected[name] + 0.5 * weight
    for name, values in expected.items():
        torch.testing.assert_close(average[name], values, rtol=1e-5, atol=1e-7)


def test_an_average_that_is_asked_for_later_begins_from_the_weights(
    corpus: Path, tmp_path: Path
) -> None:
    config = tiny_run(tmp_path)
    config.data.folder = str(corpus)
    config.schedule.steps = 2
    start(config, 1)
    config.ema.decay = 1 - 1e-9
    config.schedule.steps = 3
    start(config, 1)
    average, before = read(config, 3, "ema/"), read(config, 2, "weight/")
    for name, weight in before.items():
        torch.testing.assert_close(average[name], weight, rtol=1e-6, atol=1e-6)


def test_evaluate_generate_and_export_take_the_average_if_asked(
    corpus: Path, tmp_path: Path
) -> None:
    """As from a run whose weights the average is."""
    model = FAMILIES["v3"]
    trained, average = random_state(model), random_state(model)
    average |= {name: value for name, value in trained.items() if name.startswith("buffer/")}
    both = trained | {ema_name(name): value for name, value in average.items()}
    asked = random_run(tmp_path / "both", corpus, model=model, state=both).run_dir
    plain = random_run(tmp_path / "average", corpus, model=model, state=average).run_dir

    def use(run_dir: str, out: str, **choice: Any) -> tuple[Any, ...]:
        folder = tmp_path / out
        greedy = {"prompts": ["def "], "max_new_tokens": 8, "temperature": 0.0}
        export(ExportConfig(run_dir=run_dir, out=str(folder), gate=False, **choice))
        return (
            evaluate_run(EvaluateConfig(run_dir=run_dir, max_sequences=4, **choice)),
            list(Writer(GenerateConfig(run_dir=run_dir, **greedy, **choice)).write()),
            (folder / "model.safetensors").read_bytes(),
        )

    expected = use(plain, "expected")
    assert use(asked, "asked", weights=Weights.ema) == expected
    for got, of_average in zip(use(asked, "not asked"), expected, strict=True):
        assert got != of_average, "weights=trained is the default"


def test_an_average_that_is_not_there_is_refused(corpus: Path, tmp_path: Path) -> None:
    run_dir = random_run(tmp_path, corpus, model=FAMILIES["v3"]).run_dir
    message = "weights=ema, but the checkpoint of step 7 holds no average: .* weights=trained"
    out = tmp_path / "out"
    for use in (
        lambda: evaluate_run(EvaluateConfig(run_dir=run_dir, weights=Weights.ema)),
        lambda: Writer(GenerateConfig(run_dir=run_dir, weights=Weights.ema)),
        lambda: export(ExportConfig(run_dir=run_dir, out=str(out), weights=Weights.ema)),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert not out.exists()


@pytest.mark.parametrize(("key", "value"), [("decay", 1.0), ("decay", -0.1), ("every", 0)])
def test_rates_that_make_no_average_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"ema.{key}={value}"):
        check_ema(EMAConfig(**{key: value}))
