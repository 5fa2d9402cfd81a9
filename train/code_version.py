"""Which code wrote a checkpoint."""

import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("thrifty", "torch", "deepspeed")
ROOT = Path(__file__).parents[1]


def code_version() -> dict[str, str]:
    """Versions of the packages, and the commit (`-dirty` with changes) of a git checkout."""
    versions = {name: version(name) for name in PACKAGES}
    commit = find_commit(ROOT)
    return versions | ({"commit": commit} if commit else {})


def find_commit(root: Path) -> str | None:
    """The commit of the work tree in `root`; None for an installed package or without git."""
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    command = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    result = subprocess.run(  # noqa: S603 (our own arguments)
        [*command, "--exclude=*"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None
