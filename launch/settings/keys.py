"""Every key of a config schema, read from its dataclasses: for error messages and the docs."""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, NamedTuple, get_args, get_type_hints

from data.config import DATA_KINDS, DataConfig
from launch.settings.config import LAUNCH_KINDS, LaunchConfig
from model.config import MODEL_KINDS, ModelConfig
from train.optimizer.config import OPTIMIZER_KINDS, OptimizerConfig
from train.schedule import SCHEDULE_KINDS, ScheduleConfig

# Sections whose settings depend on the option that is chosen for their group.
KINDS: dict[type, dict[str, type[Any]]] = {
    ModelConfig: dict(MODEL_KINDS),
    DataConfig: dict(DATA_KINDS),
    ScheduleConfig: dict(SCHEDULE_KINDS),
    OptimizerConfig: dict(OPTIMIZER_KINDS),
    LaunchConfig: dict(LAUNCH_KINDS),
}


class Key(NamedTuple):
    name: str  # dotted, from the root
    type: str  # as a reader of YAML writes it
    default: str | None  # None: must be chosen
    comment: str
    options: tuple[str, ...]  # kinds of its section that have this key; empty: all of them


def list_keys(schema: type[Any], *, prefix: str = "") -> Iterator[Key]:
    """All leaves of the schema, in the order of its source."""
    hints, comments = get_type_hints(schema), read_comments(schema)
    for field in fields(schema):
        name, hint = prefix + field.name, _section_type(hints[field.name])
        if hint in KINDS:
            yield from _list_kinds(hint, prefix=f"{name}.")
        elif is_dataclass(hint):
            assert isinstance(hint, type)
            yield from list_keys(hint, prefix=f"{name}.")
        elif is_dataclass(element := _list_element(hint)):
            assert isinstance(element, type)
            yield Key(name, "list", _default(field), comments[field.name], ())
            yield from list_keys(element, prefix=f"{name}[].")
        else:
            yield Key(name, _type_name(hint), _default(field), comments[field.name], ())


def _section_type(hint: Any) -> Any:
    """The dataclass of a section that may be null; any other type as it is."""
    if _list_element(hint) is not None:
        return hint
    sections = [argument for argument in get_args(hint) if is_dataclass(argument)]
    return sections[0] if sections else hint


def _list_element(hint: Any) -> Any:
    """What a list holds; None for what is no list."""
    return get_args(hint)[0] if getattr(hint, "__origin__", None) is list else None


def _list_kinds(section: type[Any], *, prefix: str) -> Iterator[Key]:
    """The keys that all kinds share, then those that only some have."""
    kinds = KINDS[section]
    owners: dict[str, tuple[Key, list[str]]] = {}
    for kind, schema in kinds.items():
        for key in list_keys(schema, prefix=prefix):
            owners.setdefault(key.name, (key, []))[1].append(kind)
    for key, options in owners.values():
        if len(options) == len(kinds):
            yield key
    for key, options in owners.values():
        if len(options) < len(kinds):
            yield key._replace(options=tuple(options))


def read_comments(schema: type[Any]) -> dict[str, str]:
    """The `#:` comment above each field, bases' fields included; empty where there is none."""
    comments: dict[str, str] = {}
    for owner in reversed([cls for cls in schema.__mro__ if is_dataclass(cls)]):
        source = textwrap.dedent(inspect.getsource(owner))
        lines = source.splitlines()
        definition = ast.parse(source).body[0]
        assert isinstance(definition, ast.ClassDef)
        for statement in definition.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                comment = _comment_above(lines, statement.lineno - 1)
                comments[statement.target.id] = comment or comments.get(statement.target.id, "")
    return comments


def _comment_above(lines: list[str], index: int) -> str:
    found: list[str] = []
    while lines[index - 1].strip().startswith("#:"):
        index -= 1
        found.insert(0, lines[index].strip().removeprefix("#:").strip())
    return " ".join(found)


def _type_name(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(member.name for member in hint)
    if hint is type(None):
        return "null"
    arguments = get_args(hint)
    if not arguments:
        return str(hint.__name__)
    if _list_element(hint) is not None:
        return f"list of {_type_name(arguments[0])}"
    if getattr(hint, "__origin__", None) is dict:
        return f"{_type_name(arguments[1])} of each {_type_name(arguments[0])}"
    return " | ".join(_type_name(argument) for argument in arguments)


def _default(field: Any) -> str | None:
    if field.default is not MISSING:
        value = field.default
    elif field.default_factory is not MISSING:
        value = field.default_factory()
    else:
        return None
    if isinstance(value, Enum):
        return value.name
    return value if isinstance(value, str) and value else json.dumps(value)
