"""From a command line to composed configs, one or, under `-m`, several: where Hydra is used.

Hydra reports mistakes in its own words with exit code 1 and hides what a job returns. Here
every mistake of the user ends in one message (`launch.settings.mistake`) and exit code 2, and a
corpus that can't be read just now in exit code 1.
"""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from data.config import DATA_KINDS
from data.credentials import refuse_credentials
from data.failure import ReadError
from launch.settings.config import LAUNCH_KINDS
from launch.settings.help import describe_groups
from launch.settings.mistake import MISTAKES, explain, unknown_key
from model.config import MODEL_KINDS
from train.config import model_schema
from train.optimizer.config import OPTIMIZER_KINDS
from train.outcome import ExitCode
from train.schedule import SCHEDULE_KINDS

Config = TypeVar("Config")

# Hydra raises its errors, instead of printing them and exiting, when this is "1".
RAISE_ERRORS = "HYDRA_FULL_ERROR"


# Keys whose values may be URLs.
PLACES = (
    *("corpus", "data.folder", "data.sources", "data.tokenizer", "data.name"),
    *("data.paths", "data.validation_paths"),
)


class Job(NamedTuple):
    """One composed config, as values that are not yet checked."""

    values: DictConfig
    overrides: list[str]
    folder: Path | None  # below the sweep's folder; None where the command is no sweep


class Result(NamedTuple):
    job: Job
    exit_code: ExitCode
    complaint: str  # why nothing was started; empty where something was


def run_jobs(
    run: Callable[[Job], ExitCode], *, schema: type[Any], config_name: str = "config"
) -> list[Result]:
    """One result per job that the command line asks for, in the order in which they ran.

    A mistake in the command line itself ends the process with one message and exit code 2; a
    job that can't be run is a result, and the next one of the sweep starts. After an
    interrupted job no further one starts. `--help` and `--cfg` give no result.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(describe_groups(config_name))
        return []
    _register(schema)
    results: list[Result] = []
    show_traceback = os.environ.get(RAISE_ERRORS) == "1"

    def run_job(values: DictConfig) -> None:
        job = _job(values)
        if results and results[-1].exit_code == ExitCode.INTERRUPTED:
            return
        try:
            results.append(Result(job, run(job), ""))
        except KeyboardInterrupt:
            print("interrupted before the ranks were started", file=sys.stderr)
            results.append(Result(job, ExitCode.INTERRUPTED, ""))
        except ReadError as error:  # nobody's mistake: the same command may do better later
            print(error, file=sys.stderr)
            results.append(Result(job, ExitCode.FAILED, str(error)))
        except MISTAKES as error:
            if show_traceback:
                raise
            complaint = explain(error, schema=schema, overrides=job.overrides)
            print(complaint, file=sys.stderr)
            results.append(Result(job, ExitCode.MISTAKE, complaint))

    main = hydra.main(version_base="1.3", config_path="pkg://configs", config_name=config_name)
    logging.getLogger("hydra").setLevel(logging.WARNING)
    os.environ[RAISE_ERRORS] = "1"
    try:
        refuse_credentials_in(sys.argv[1:])  # before a sweep writes down what it was asked
        main(run_job)()
    except MISTAKES as error:
        if show_traceback:
            raise
        print(explain(error, schema=schema, overrides=sys.argv[1:]), file=sys.stderr)
        raise SystemExit(ExitCode.MISTAKE) from None
    finally:
        if not show_traceback:
            del os.environ[RAISE_ERRORS]
    return results


def refuse_credentials_in(arguments: list[str]) -> None:
    """Raises ValueError where a place on the command line is a URL with a password or token."""
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key.startswith(PLACES):
            refuse_credentials(key, value)


def first_word_is_the_action(actions: type[StrEnum]) -> None:
    """Let `thrifty VERB ACTION ...` be short for `thrifty VERB action=ACTION ...`."""
    if len(sys.argv) > 1 and sys.argv[1] in actions.__members__:
        sys.argv[1] = f"action={sys.argv[1]}"


def to_config(values: DictConfig, schema: type[Config]) -> Config:
    """The values as the typed config of a verb.

    Raises:
        ValueError: A key was added (`+key=value`) that the schema lacks.
        OmegaConfBaseException: A mandatory value is missing or an interpolation leads nowhere.
    """
    for added in _added_keys(values):
        raise ValueError(unknown_key(added, schema=schema, overrides=sys.argv[1:]))
    config = OmegaConf.to_object(values)
    assert isinstance(config, schema)
    return config


def worst(results: list[Result]) -> ExitCode:
    """The exit code of the whole command: an interruption first, then the first that failed."""
    codes = [result.exit_code for result in results]
    if ExitCode.INTERRUPTED in codes:
        return ExitCode.INTERRUPTED
    return next((code for code in codes if code != ExitCode.FINISHED), ExitCode.FINISHED)


def _register(schema: type[Any]) -> None:
    """Give Hydra the types: the root's, and those of the options of groups with several kinds."""
    ConfigStore.instance().store(name="schema", node=schema)
    _register_kinds()


@cache
def _register_kinds() -> None:
    store = ConfigStore.instance()
    for kind in MODEL_KINDS:
        store.store(group="model", name=f"{kind}_schema", node=model_schema(kind))
    for group, kinds in (
        ("data", DATA_KINDS),
        ("schedule", SCHEDULE_KINDS),
        ("optimizer", OPTIMIZER_KINDS),
        ("launch", LAUNCH_KINDS),
    ):
        for kind, node in kinds.items():
            store.store(group=group, name=f"{kind}_schema", node=node)


def _job(values: DictConfig) -> Job:
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir) if settings.mode is RunMode.MULTIRUN else None
    # Unresolved: an override may itself hold an interpolation.
    overrides: Any = OmegaConf.to_container(settings.overrides.task, resolve=False)
    return Job(values, overrides, folder)


def _added_keys(values: DictConfig, *, prefix: str = "") -> list[str]:
    """Keys that the typed sections lack; `+key=value` is the one way to add them."""
    schema = OmegaConf.get_type(values)
    known = {field.name for field in fields(schema)} if is_dataclass(schema) else set(values)
    added = [f"{prefix}{key!s}" for key in values if key not in known]
    for key in known:
        is_section = OmegaConf.is_dict(values._get_node(key))
        if is_section and not OmegaConf.is_missing(values, key) and values[key] is not None:
            added += _added_keys(values[key], prefix=f"{prefix}{key}.")
    return added
