"""What the user did wrong, in one message: key, value, rule and way out."""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import yaml
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from launch.settings.keys import Key, list_keys

# What a person at the command line, or the machine, can cause. Our own errors among these speak for
# themselves (RuntimeError: a worker of `prepare` died); HYDRA_FULL_ERROR=1 shows the traceback.
MISTAKES = (
    ValueError,
    OSError,
    RuntimeError,
    HydraException,
    OmegaConfBaseException,
    yaml.YAMLError,
)


def explain(error: BaseException, *, schema: type[Any], overrides: list[str]) -> str:
    """One message about the mistake behind an error of ours, of Hydra or of OmegaConf."""
    causes = list(_causes(error))
    for cause in causes:
        key = getattr(cause, "full_key", None)
        match cause:
            case ConfigAttributeError() | ConfigKeyError() if key:
                return unknown_key(key, schema=schema, overrides=overrides)
            case ValidationError() if key:
                return _wrong_value(key, cause, schema=schema, overrides=overrides)
            case MissingMandatoryValue() if key:
                return _missing_value(key, schema=schema)
            case InterpolationResolutionError():
                given = next((o for o in overrides if "${" in o), "a value in the config")
                return f"{given}: {str(cause).splitlines()[0]}; name an existing key in ${{...}}"
            case MissingConfigException():
                return _unknown_option(cause)
            case OverrideParseException():
                return (
                    f"{cause.override}: this can't be read as key=value; put values with spaces "
                    f"or special characters in quotes, such as 'key=\"a value\"'"
                )
            case yaml.YAMLError():
                return f"not YAML: {' '.join(str(cause).split())}"
            case ConfigCompositionException() if "Ambiguous value" in str(cause):
                return _ambiguous_value(cause)
    return str(error).splitlines()[0] if isinstance(error, HydraException) else str(error)


def unknown_key(name: str, *, schema: type[Any], overrides: list[str]) -> str:
    """That there is no such key, and which one was probably meant."""
    given = _given(name, overrides)
    keys = list(list_keys(schema))
    group = name.split(".")[0]
    owners = [f"{group}={option}" for key in keys if key.name == name for option in key.options]
    if owners:
        return (
            f"{given}: {name} exists only with {' or '.join(owners)}; choose that or leave it out"
        )
    nearest = _nearest(name, keys)
    hint = f"did you mean {nearest}? " if nearest else ""
    return f"{given}: there is no key {name}; {hint}All keys: --cfg job"


def _wrong_value(
    name: str, error: ValidationError, *, schema: type[Any], overrides: list[str]
) -> str:
    given = _given(name, overrides)
    key = next((key for key in list_keys(schema) if key.name == name), None)
    if key is None:
        return f"{given}: {name} is a section; set one of its keys, such as {name}.KEY=VALUE"
    reason = str(error).splitlines()[0]
    return f"{given}: {name} must be {key.type} ({reason})"


def _missing_value(name: str, *, schema: type[Any]) -> str:
    key = next((key for key in list_keys(schema) if key.name == name), None)
    if key is None:
        return f"{name} has not been chosen; choose an option of that group, such as {name}=NAME"
    return f"{name} has no default and must be given ({key.type}): {key.comment}"


def _unknown_option(error: MissingConfigException) -> str:
    found = re.search(r"Could not find '(.+)/(.+)'", str(error))
    if found is None:
        return str(error).splitlines()[0]
    group, option = found.groups()
    options = [name for name in error.options or [] if not name.endswith("_schema")]
    choices = f"choose one of {', '.join(options)}" if options else "that group has none"
    return f"{group}={option}: there is no such option; {choices}"


def _ambiguous_value(error: ConfigCompositionException) -> str:
    found = re.search(r"'(.+)'", str(error).splitlines()[0])
    given = found.group(1) if found else ""
    name, _, value = given.partition("=")
    return f"{given}: these are several values; add -m for one run each, or write {name}=[{value}]"


def _given(name: str, overrides: list[str]) -> str:
    """What was typed for a key, or its name where the value comes from a file."""
    for override in overrides:
        typed = override.lstrip("+~").split("=")[0]
        if typed == name or typed.startswith(f"{name}."):
            return override
    return name


def _nearest(name: str, keys: list[Key]) -> str | None:
    names = {key.name for key in keys}
    sections = {".".join(full.split(".")[:depth]) for full in names for depth in (1, 2)}
    candidates = sorted(names | sections)
    leaf = name.split(".")[-1]
    same_leaf = [full for full in candidates if full.split(".")[-1] == leaf]
    by_leaf = {full.split(".")[-1]: full for full in candidates}
    close = get_close_matches(name, same_leaf or candidates, n=1)
    close_leaf = [by_leaf[found] for found in get_close_matches(leaf, by_leaf, n=1, cutoff=0.75)]
    return next(iter([*close, *same_leaf, *close_leaf]), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
