"""`python -m launch.pages.reference`: writes the pages of docs/ that are made from the code.

docs/configs.md, every key of every verb, is made here; docs/layouts.md in `layout_page.py`, the
tables of docs/parallelism.md in `layout_costs.py`, both beside this.
"""

from collections.abc import Iterator
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from launch.checkpoints import CheckpointsConfig
from launch.data import LookConfig
from launch.grow import OWN_KEYS, GrownRun
from launch.pages import layout_costs, layout_page
from launch.settings.config import LaunchedRun
from launch.settings.help import describe_options
from launch.settings.keys import Key, list_keys
from train.evaluate_run import EvaluateConfig
from train.generate import GenerateConfig
from train.hub.export import ExportConfig
from train.verify.config import VerifyConfig

PAGE = Path("docs/configs.md")

INTRODUCTION = """\
# Configs

<!-- Written by `make docs` (launch/pages/reference.py) from the dataclasses; do not edit. -->

Every key that a command takes, with its type, the default of its schema and its meaning. "Chosen"
means that the schema has no default: the option of the group gives the value, or you do. Options
of groups are the files in `configs/`; `thrifty train --cfg job` prints the values that a command
line comes to. An unknown key, a value of a wrong type or a combination that can't be run ends
with a message and exit code 2 before anything is started.
"""


def write_reference() -> str:
    """The page's text."""
    lines = [INTRODUCTION, "## thrifty train, thrifty prepare, thrifty plan", ""]
    for section, keys in groupby(list_keys(LaunchedRun), key=lambda key: _section(key.name)):
        lines += [f"### {section}" if section else "### The run itself", ""]
        options = list(_options(section))
        lines += [*options, ""] if options else []
        lines += [*_table(keys), ""]
    lines += ["## thrifty verify", "", "All keys of `thrifty train`, and:", ""]
    lines += [*_table(list_keys(VerifyConfig, prefix="verify.")), ""]
    schemas: dict[str, type[Any]] = {
        "evaluate": EvaluateConfig,
        "generate": GenerateConfig,
        "export": ExportConfig,
        "checkpoints": CheckpointsConfig,
        "data": LookConfig,
    }
    for verb, schema in schemas.items():
        lines += [f"## thrifty {verb}", "", *_table(list_keys(schema)), ""]
    grown = [key for key in list_keys(GrownRun) if key.name.split(".")[0] in OWN_KEYS]
    also = "Besides these, any key of `thrifty train`; what is not given is the run's that grows."
    lines += ["## thrifty grow", "", also, "", *_table(iter(grown)), ""]
    return "\n".join(lines)


def _section(name: str) -> str:
    return name.split(".")[0] if "." in name else ""


def _options(section: str) -> Iterator[str]:
    group = files("configs") / section
    if section and group.is_dir():
        yield from (f"- `{section}={name}`: {about}" for name, about in describe_options(group))


def _table(keys: Iterator[Key]) -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for key in keys:
        kind = key.type.replace("|", "\\|")
        default = "chosen" if key.default is None else f"`{key.default}`"
        only = f" (only {', '.join(key.options)})" if key.options else ""
        meaning = key.comment or "Set by the group's option."
        yield f"| `{key.name}` | {kind} | {default} | {meaning}{only} |"


if __name__ == "__main__":
    PAGE.write_text(write_reference())
    layout_page.PAGE.write_text(layout_page.write_page())
    costs = layout_costs.PAGE
    costs.write_text(layout_costs.write_page(costs.read_text()))
