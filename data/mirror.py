"""Where the local copies of a corpus behind a URL lie."""

import os
from hashlib import sha256
from pathlib import Path

CACHE_VARIABLE = "THRIFTY_CACHE"


def is_remote(folder: str) -> bool:
    """Whether a folder is a URL."""
    return "://" in folder


def mirror_folder(url: str) -> Path:
    """The local folder of a remote one: below $THRIFTY_CACHE, or ~/.cache/thrifty."""
    root = Path(os.environ.get(CACHE_VARIABLE, "~/.cache/thrifty")).expanduser()
    url = url.rstrip("/")
    return root / f"{url.rsplit('/', 1)[-1]}-{sha256(url.encode()).hexdigest()[:12]}"
