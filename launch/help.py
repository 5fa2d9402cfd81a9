"""What `--help` prints: the verbs, the config groups, and how settings are given."""

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from omegaconf import OmegaConf

USAGE = """\
Settings are given as key=value, an option of a group as group=option:

  thrifty train experiment=demo launch.processes=2
  thrifty train model=demo model.moe.num_experts=32 schedule.steps=1000
  thrifty train -m model.moe.num_experts=8,16,32    a run for each, and a table of them
  thrifty train --cfg job                           prints the config and runs nothing

Starting again with the same run_dir continues that run. Every key: docs/configs.md.
Exit codes: 0 finished, 1 failed, 2 a mistake in the command (nothing was started),
75 interrupted and saved (the same command continues)."""


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
