"""Every experiment, and every option of every group, composes into a run that can be started."""

from pathlib import Path

import pytest

from tests.command import compose

CONFIGS = Path(__file__).parents[1] / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONFIGS.glob("*/*.yaml")
    if path.parent.name != "experiment"
)

# What an option leaves for the user to choose.
CHOSEN = {"data=files": ["data.paths=[a.txt]"], "data=hub": ["data.name=a/b"]}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_composes_into_a_valid_run(experiment: str) -> None:
    compose(f"experiment={experiment}")


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
