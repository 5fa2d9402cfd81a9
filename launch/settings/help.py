"""What `--help` prints: the verbs, the config groups, and how settings are given."""

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from omegaconf import OmegaConf

from launch.settings.config import LaunchedRun
from launch.settings.keys import list_keys

USAGE = """\
Settings are given as key=value, an option of a group as group=option:

  thrifty train experiment=demo launch.processes=2
  thrifty train model=demo model.moe.num_experts=32 schedule.steps=1000
  thrifty train -m model.moe.num_experts=8,16,32    a run for each, and a table of them
  thrifty train --cfg job                           prints the config and runs nothing

Starting again with the same run_dir continues that run. Every key: docs/configs.md.
Exit codes: 0 finished, 1 failed, 2 a mistake in the command (nothing was started),
75 interrupted and saved (the same command continues)."""


LAUNCH_USAGE = """\
thrifty launch [settings of thrifty train] launch=HOW launch.KEY=VALUE ... [--dry-run]

Checks the nodes (thrifty doctor), starts the run on them and keeps it alive; thrifty status RUN_DIR
says what happened. --dry-run prints every command and file that would be used, and does nothing.
run_dir is the one folder that all nodes must share."""


def describe_groups(config_name: str) -> str:
    """Groups of a root config with their options, one line each, and the rules for settings."""
    configs = files("configs")
    root: Any = OmegaConf.create((configs / f"{config_name}.yaml").read_text())
    lines = [USAGE]
    for entry in root.defaults:
        if isinstance(entry, str) or next(iter(entry)).startswith("override "):
            continue
        group, chosen = next(iter(entry.items()))
        lines.append(f"\n{group}" + (f" (default: {chosen})" if chosen else ""))
        lines += [
            f"  {group + '=' + option:26} {line}"
            for option, line in describe_options(configs / group)
        ]
    return "\n".join(lines)


def describe_options(group: Traversable) -> Iterator[tuple[str, str]]:
    """Name and first comment of each option, in alphabetical order."""
    for file in sorted(group.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            comments = [line for line in file.read_text().splitlines() if line.startswith("# ")]
            about = next((line for line in comments if "@package" not in line), "# ")
            yield file.name.removesuffix(".yaml"), about.removeprefix("# ")


def describe_launch() -> str:
    """What `thrifty launch --help` prints: the ways to start ranks, and every key of each."""
    lines = [LAUNCH_USAGE, "", "launch (default: local)"]
    options = describe_options(files("configs") / "launch")
    lines += [f"  {'launch=' + option:18} {line}" for option, line in options]
    for key in list_keys(LaunchedRun):
        if key.name.startswith("launch.") and key.name != "launch.kind":
            only = f"  (launch={'|'.join(key.options)})" if key.options else ""
            lines += [
                "",
                f"{key.name}: {key.type}, default {key.default}{only}",
                f"  {key.comment}",
            ]
    return "\n".join(lines)
