import os
from dataclasses import replace
from pathlib import Path

import pytest

from launch.run_folder import hold_folder, newest_run, prepare_folder, take_up
from launch.settings.config import LaunchedRun
from tests.command import compose
from train.config import CONFIG_FILE, RunConfig, read_config


@pytest.fixture
def config(tmp_path: Path) -> LaunchedRun:
    return compose("experiment=smoke", f"run_dir={tmp_path / 'run'}")


def begin(config: LaunchedRun) -> None:
    """What a start that came as far as its first checkpoint leaves."""
    prepare_folder(config)
    (Path(config.run_dir) / "checkpoints/step-00000006").mkdir(parents=True)


def test_ranks_read_the_config_that_was_composed(config: LaunchedRun) -> None:
    prepare_folder(config)
    read = read_config(Path(config.run_dir) / CONFIG_FILE, RunConfig)
    assert read.model == config.model
    assert read.schedule == config.schedule
    assert read.data == config.data


def test_a_continuation_tells_what_changed(config: LaunchedRun) -> None:
    begin(config)
    assert prepare_folder(config) == []
    changed = replace(config, schedule=replace(config.schedule, steps=20))
    assert list(map(str, prepare_folder(changed))) == ["schedule.steps: 12 -> 20"]
    assert prepare_folder(changed) == []


@pytest.mark.parametrize(
    "change",
    ["model.dim=64", "seed=3", "data.validation_fraction=0.1", "data.tokenizer.vocab_size=2048"],
)
def test_a_folder_of_another_run_is_refused_and_left_as_it_was(
    change: str, config: LaunchedRun
) -> None:
    begin(config)
    before = (Path(config.run_dir) / CONFIG_FILE).read_text()
    other = compose("experiment=smoke", f"run_dir={config.run_dir}", change)
    key = change.split("=")[0]
    with pytest.raises(ValueError, match=rf"holds a run with other settings \(.*{key}: "):
        prepare_folder(other)
    assert (Path(config.run_dir) / CONFIG_FILE).read_text() == before


def test_a_run_continues_with_its_own_settings_and_the_values_given(config: LaunchedRun) -> None:
    config.launch.processes = 2
    begin(config)
    overrides = [f"run_dir={config.run_dir}", "schedule.steps=400"]
    continued = take_up(compose(*overrides), overrides)
    expected = replace(config, schedule=replace(config.schedule, steps=400))
    assert continued == expected


def test_a_chosen_group_is_taken_from_the_command_line_and_the_others_from_the_run(
    config: LaunchedRun,
) -> None:
    begin(config)
    overrides = [f"run_dir={config.run_dir}", "schedule=wsd", "schedule.decay_steps=3"]
    continued = take_up(compose(*overrides), overrides)
    assert (continued.model, continued.data) == (config.model, config.data)
    assert continued.schedule.kind == "wsd"
    assert continued.schedule.decay_steps == 3


def test_an_experiment_on_the_command_line_chooses_all(config: LaunchedRun) -> None:
    begin(config)
    overrides = [f"run_dir={config.run_dir}", "experiment=demo"]
    composed = compose(*overrides)
    assert take_up(composed, overrides) is composed


def test_a_folder_without_a_checkpoint_takes_any_settings(config: LaunchedRun) -> None:
    """A first start that failed (a wrong path, say) must not bind the second."""
    prepare_folder(config)
    other = compose("experiment=smoke", f"run_dir={config.run_dir}", "model.dim=64")
    assert prepare_folder(other) == []
    assert read_config(Path(config.run_dir) / CONFIG_FILE, RunConfig).model.dim == 64


def test_a_corpus_may_have_moved(config: LaunchedRun) -> None:
    begin(config)
    moved = replace(config, data=replace(config.data, folder="elsewhere"))
    assert [change.key for change in prepare_folder(moved)] == ["data.folder"]


def test_a_second_start_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with hold_folder(tmp_path), pytest.raises(ValueError, match="another process trains in it"):  # noqa: SIM117
        with hold_folder(tmp_path):
            pass


def test_the_newest_run_may_be_one_of_a_sweep(tmp_path: Path) -> None:
    for age, name in ((300, "old"), (100, "sweep/1"), (200, "sweep/0")):
        checkpoints = tmp_path / name / "checkpoints"
        checkpoints.mkdir(parents=True)
        os.utime(checkpoints, (1e9 - age, 1e9 - age))
    assert newest_run(tmp_path) == str(tmp_path / "sweep/1")
