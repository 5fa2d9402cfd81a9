"""Passwords and tokens don't belong into a URL: it is logged, and kept in configs and checkpoints.

File systems take them from elsewhere: from their own variables and files (`AWS_...`), or from
fsspec's (`FSSPEC_HTTPS`, ~/.config/fsspec).
"""

import re

URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<rest>[^\s'\"]*)", re.IGNORECASE)
PORT = re.compile(r":\d+$")


def refuse_credentials(key: str, text: str) -> None:
    """Raises ValueError where a URL in the value of a key holds what nobody should read, and says
    so without repeating it."""
    for url in URL.finditer(text):
        if (fault := _find_fault(url["scheme"].lower(), url["rest"])) is not None:
            raise ValueError(
                f"{key} is a URL ({url['scheme']}://...) with {fault}, which would be logged and "
                "saved with the run; leave it out, and give credentials to the file system: "
                "AWS_ACCESS_KEY_ID and the like, or fsspec's configuration (docs/data.md)"
            )


def _find_fault(scheme: str, rest: str) -> str | None:
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, host = authority.rpartition("@")
    is_web = scheme in ("http", "https")  # elsewhere what stands before the @ may be a container
    if at and (":" in user or is_web):
        return "a user's name or password"
    if ":" in PORT.sub("", host) and not host.startswith("["):  # a password with a / in it
        return "something else than a port after a colon"
    if "?" in rest or "#" in rest:
        return "a query (?...) or fragment (#...)"
    return None
