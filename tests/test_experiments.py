"""Every experiment, and every option of every group, composes into a run that can be started."""

from bisect import bisect_right
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from launch.settings.config import LaunchedRun
from tests.command import compose
from train.schedule import batch_size, learning_rate, model_at

CONFIGS = Path(__file__).parents[1] / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONFIGS.glob("*/*.yaml")
    if path.parent.name not in ("experiment", "model")  # models: tests/test_presets.py
)

# What an option leaves for the user to choose.
CHOSEN = {
    "data=files": ["data.paths=[a.txt]"],
    "data=hub": ["data.name=a/b"],
    "data=tokenized": [
        "data.paths=[a.bin]",
        "data.validation_paths=[b.bin]",
        f"data.tokenizer.path={__file__}",
    ],
    **{f"launch={kind}": ["launch.hosts=[node1]"] for kind in ("ssh", "pdsh", "openmpi")},
    "data=mixture": ["data.sources=[{name: a, folder: b, weight: 1}]"],
}
# Experiments that continue another run.
CONTINUED = {"recipe_coder_v2", "recipe_coder_v2_lite"} | {
    name for name in EXPERIMENTS if name.startswith(("extend_", "recipe_r1"))
}


@cache
def experiment(name: str) -> LaunchedRun:
    return compose(f"experiment={name}", *["init_from=runs/other"] * (name in CONTINUED))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_composes_into_a_valid_run(name: str) -> None:
    experiment(name)


@pytest.mark.parametrize("name", sorted(CONTINUED))
def test_an_experiment_that_continues_another_run_asks_for_it(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compose(f"experiment={name}")
    assert "init_from is empty; give the folder of the run" in capfd.readouterr().err


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_a_group_composes_into_a_valid_run(option: str) -> None:
    compose(option, *CHOSEN.get(option, []))


def test_an_experiments_values_win_over_the_root_config() -> None:
    config = compose("experiment=demo")
    assert config.launch.processes == 2
    assert config.parallel.expert == 2


def test_the_demo_is_what_it_promises() -> None:
    config = compose("experiment=demo")
    assert config.model.moe.num_experts >= 16
    assert config.model.mtp.depth == 1
    assert config.schedule.steps >= 300


class Published(NamedTuple):
    """What a paper says of a run, at numbers of tokens."""

    tokens: float
    rates: list[tuple[float, float]]  # (tokens, learning rate)
    batches: list[tuple[float, int]]  # (tokens, sequences)


COSINE_MIDDLE = (2.2e-4 + 2.2e-5) / 2
RECIPES = {
    "recipe_v3": Published(  # arXiv:2412.19437, 4.2
        14.8e12,
        [
            (0.1e12, 2.2e-4),
            (9.99e12, 2.2e-4),
            (12.15e12, COSINE_MIDDLE),
            (14.31e12, 2.2e-5),
            (14.63e12, 2.2e-5),
            (14.64e12, 7.3e-6),
            (14.79e12, 7.3e-6),
        ],
        [(0, 3072), (470e9, 15360), (14.7e12, 15360)],
    ),
    "recipe_v2": Published(  # arXiv:2405.04434, 3.1.2
        8.1e12,
        [
            (0.599 * 8.1e12, 2.4e-4),
            (0.601 * 8.1e12, 2.4e-4 * 0.316),
            (0.899 * 8.1e12, 2.4e-4 * 0.316),
            (0.901 * 8.1e12, 2.4e-4 * 0.316**2),
        ],
        [(0, 2304), (226e9, 9216)],
    ),
    "recipe_v2_lite": Published(  # arXiv:2405.04434, appendix B
        5.7e12,
        [
            (0.799 * 5.7e12, 4.2e-4),
            (0.801 * 5.7e12, 4.2e-4 * 0.316),
            (0.901 * 5.7e12, 4.2e-4 * 0.316**2),
        ],
        [(0, 4608), (5e12, 4608)],
    ),
    "recipe_llm_7b": Published(  # arXiv:2401.02954, 2.3
        2e12,
        [(1.59e12, 4.2e-4), (1.61e12, 4.2e-4 * 0.316), (1.81e12, 4.2e-5)],
        [(0, 2304)],
    ),
    "recipe_llm_67b": Published(
        2e12,
        [(1.59e12, 3.2e-4), (1.61e12, 3.2e-4 * 0.316), (1.81e12, 3.2e-5)],
        [(0, 4608)],
    ),
    "recipe_coder_1b3": Published(2e12, [(1e12, 5.3e-4), (1.99e12, 5.3e-5)], [(0, 1024)]),
    "recipe_coder_6b7": Published(2e12, [(1e12, 4.2e-4), (1.99e12, 4.2e-5)], [(0, 2304)]),
    "recipe_coder_33b": Published(2e12, [(1e12, 3.5e-4), (1.99e12, 3.5e-5)], [(0, 3840)]),
    "recipe_coder_v2": Published(6e12, [(0.1e12, 2.4e-4), (6e12 - 1e8, 2.4e-5)], [(0, 9216)]),
    "recipe_coder_v2_lite": Published(6e12, [(0.1e12, 4.2e-4), (6e12 - 1e8, 4.2e-5)], [(0, 4608)]),
}


def tokens_before(name: str, step: int) -> int:
    """How many tokens the run has seen when `step` begins."""
    config = experiment(name)
    ramp = min(step, config.schedule.batch_ramp.steps)
    sequences = sum(batch_size(config.schedule, earlier) for earlier in range(ramp))
    return config.data.seq_len * (sequences + config.schedule.batch_size * (step - ramp))


def step_at(name: str, tokens: float) -> int:
    """The step in which the run sees its `tokens`-th token."""
    steps = range(experiment(name).schedule.steps)
    return bisect_right(steps, tokens, key=lambda step: tokens_before(name, step)) - 1


class Tuned(NamedTuple):
    """What R1's paper says of a fine-tuning (arXiv:2501.12948 v2, B.4.2, B.4.3, tables 5 and 6)."""

    peak_lr: float
    batch_size: int


TUNED = {
    "recipe_r1": Tuned(5e-5, 128),
    "recipe_r1_distill_qwen_1b5": Tuned(1e-4, 64),
    "recipe_r1_distill_qwen_7b": Tuned(8e-5, 64),
    "recipe_r1_distill_qwen_14b": Tuned(7e-5, 64),
    "recipe_r1_distill_qwen_32b": Tuned(6e-5, 64),
    "recipe_r1_distill_llama_8b": Tuned(5e-5, 64),
    "recipe_r1_distill_llama_70b": Tuned(2e-5, 64),
}
SAMPLES, TOKENS_PER_SAMPLE = 804_745, 5_355.3


def test_every_recipe_is_compared_with_its_paper() -> None:
    recipes = {name for name in EXPERIMENTS if name.startswith("recipe_")}
    assert recipes == RECIPES.keys() | TUNED.keys()


def test_every_published_preset_has_a_recipe() -> None:
    models = {path.stem for path in (CONFIGS / "model").glob("*.yaml")}
    small = {"demo", "tiny"} | {name for name in models if name.startswith("moe_")}
    assert {f"recipe_{name}" for name in models - small} == RECIPES.keys() | TUNED.keys()


@pytest.mark.parametrize("name", TUNED)
def test_a_fine_tuning_has_the_published_rate_batch_and_length(name: str) -> None:
    published, config = TUNED[name], experiment(name)
    schedule = config.schedule
    assert config.data.seq_len == 32768
    assert schedule.batch_size == published.batch_size
    assert learning_rate(schedule, 0) == published.peak_lr
    last = learning_rate(schedule, schedule.steps - 1)
    assert last == pytest.approx(published.peak_lr / 10, rel=1e-4)
    epochs = tokens_before(name, schedule.steps) / (SAMPLES * TOKENS_PER_SAMPLE)
    assert epochs == pytest.approx(2, rel=1e-3)
    assert config.model == compose(f"model={name.removeprefix('recipe_')}").model


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_to_the_published_values_at_the_published_tokens(name: str) -> None:
    published, schedule = RECIPES[name], experiment(name).schedule
    assert tokens_before(name, schedule.steps) == pytest.approx(published.tokens, rel=1e-4)
    assert learning_rate(schedule, 1999) == schedule.peak_lr
    assert learning_rate(schedule, 999) == schedule.peak_lr / 2
    for tokens, rate in published.rates:
        assert learning_rate(schedule, step_at(name, tokens)) == pytest.approx(rate, rel=2e-3)
    for tokens, size in published.batches:
        assert batch_size(schedule, step_at(name, tokens)) == size


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_starts_with_the_optimizer_and_context_of_its_paper(name: str) -> None:
    config = experiment(name)
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2) == (0.9, 0.95)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.1, 1.0)
    assert config.model.init_std == 0.006
    assert config.data.seq_len == 4096
    assert config.model.rope.scaling == "none"
    assert config.model.rope.theta == 1e4


def test_v3s_recipe_changes_its_weights_at_the_published_tokens() -> None:
    config = experiment("recipe_v3")

    def at(tokens: float) -> tuple[float, float]:
        model = model_at(config.model, config.schedule, step_at("recipe_v3", tokens))
        assert model.moe is not None
        return model.mtp.loss_weight, model.moe.router.bias_update_speed

    assert at(0) == at(9.999e12) == (0.3, 0.001)
    assert at(10.001e12) == at(14.299e12) == (0.1, 0.001)
    assert at(14.301e12) == (0.1, 0.0)
    assert config.model.moe is not None
    assert config.model.moe.balance_loss_weight == 1e-4


def test_v3s_extension_has_the_published_phases() -> None:
    for name, seq_len, sequences in (
        ("extend_32k", 32 * 1024, 1920),
        ("extend_128k", 128 * 1024, 480),
    ):
        config = experiment(name)
        schedule, rope = config.schedule, config.model.rope
        assert config.data.seq_len == seq_len
        assert (schedule.steps, schedule.batch_size) == (1000, sequences)
        assert {learning_rate(schedule, step) for step in range(1000)} == {7.3e-6}
        assert (rope.scaling, rope.factor, rope.original_seq_len) == ("yarn", 40, 4096)
        assert (rope.beta_fast, rope.beta_slow) == (32, 1)
        assert seq_len <= rope.factor * rope.original_seq_len


@pytest.mark.parametrize(
    ("name", "batches"),
    [
        ("extend_v2_32k", {32 * 1024: 576}),
        ("extend_coder_v2_32k", {32 * 1024: 1152}),
        ("extend_coder_v2_128k", {128 * 1024: 288}),
    ],
)
def test_v2s_extensions_have_the_published_batches_and_yarn(
    name: str, batches: dict[int, int]
) -> None:
    config = experiment(name)  # arXiv:2405.04434, 3.1.4; arXiv:2406.11931, 3.4
    rope = config.model.rope
    assert {config.data.seq_len: config.schedule.batch_size} == batches
    assert config.schedule.steps == 1000
    assert (rope.scaling, rope.factor, rope.beta_fast, rope.beta_slow) == ("yarn", 40, 32, 1)
    assert 0.1 * rope.mscale == pytest.approx(0.0707)


FIM = {"recipe_v3": 0.1, "recipe_coder_v2_lite": 0.5}  # arXiv:2412.19437, 4.1; 2406.11931, 3.1
FIM |= dict.fromkeys(("recipe_coder_1b3", "recipe_coder_6b7", "recipe_coder_33b"), 0.5)


@pytest.mark.parametrize("name", [*RECIPES, *TUNED])
def test_a_recipe_fills_in_the_middle_at_the_published_rate(name: str) -> None:
    fim = experiment(name).data.fim
    assert fim.rate == FIM.get(name, 0.0)
    assert fim.mode == "psm"


def test_v2s_balance_losses_have_the_published_weights() -> None:
    moe = experiment("recipe_v2").model.moe  # arXiv:2405.04434, 3.1.2
    assert moe is not None
    assert moe.balance_loss_weight == 0.003
    assert moe.device_balance_loss_weight == 0.05
    assert moe.communication_balance_loss_weight == 0.02
    assert (moe.router.num_groups, moe.router.top_groups) == (8, 3)
    lite = experiment("recipe_v2_lite").model.moe
    assert lite is not None
    assert (lite.balance_loss_weight, lite.has_group_balance_losses) == (0.001, False)


def test_an_experiments_model_can_be_exchanged() -> None:
    config = compose("experiment=extend_32k", "init_from=runs/other", "model=moe_1b")
    assert config.model.dim == 896
    assert config.model.rope.scaling == "yarn"
