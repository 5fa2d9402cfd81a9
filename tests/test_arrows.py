"""Arrows between packages: launch -> train -> model, train -> data, launch -> data."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("model", "data", "train", "launch")

FORBIDDEN = {
    "model": {"data", "train", "launch"},
    "data": {"model", "train", "launch"},
    "train": {"launch"},
    "launch": set(),
}

# Each of these is known to one place only (tests and bench apart).
CONFINED = {
    "deepspeed": "train/engine/engine.py",
    "hydra": "launch/",
    "transformers": "train/hub/gate.py",
}


def source_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported_packages(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; path equals import here"
            assert node.module is not None
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_arrows(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        against = FORBIDDEN[package] & set(imported_packages(path))
        assert not against, f"{path.relative_to(ROOT)} imports {against}"


@pytest.mark.parametrize("library", CONFINED)
def test_a_confined_library_is_imported_in_its_place_only(library: str) -> None:
    for path in source_files():
        name = path.relative_to(ROOT).as_posix()
        if library in set(imported_packages(path)):
            assert name.startswith(CONFINED[library]), f"{name} imports {library}"


def test_packages_have_empty_init_files() -> None:
    for package in (*PACKAGES, "configs"):
        folders = {path.parent for path in (ROOT / package).rglob("*.py")}
        for folder in folders:
            assert (folder / "__init__.py").read_text() == ""


def test_every_package_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.parent.relative_to(ROOT).as_posix() for path in source_files()}
    assert folders | {"configs"} == {
        name.replace(".", "/") for name in settings["tool"]["setuptools"]["packages"]
    }
