"""Failures of reading that a run is saved at, and which of them another attempt may overcome."""

import errno

LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
FORBIDDEN = {401, 403}  # HTTP's status


class ReadError(OSError):
    """A corpus' files can't be read or copied; no setting is at fault, so another start may do
    better."""

    def __init__(self, text: str, *, is_lasting: bool = False) -> None:
        """`is_lasting` says that nothing changes before somebody acts."""
        super().__init__(text)
        self.is_lasting = is_lasting


def is_lasting(error: BaseException | None) -> bool:
    """Whether another attempt would fail like this one: no room, or no permission, here or there.

    A file that isn't there may come back (its mount does, or somebody puts it there).
    """
    while error is not None:
        if (
            getattr(error, "is_lasting", False)
            or isinstance(error, PermissionError)
            or getattr(error, "errno", None) in LASTING
            or getattr(error, "status", None) in FORBIDDEN  # aiohttp's errors are no OSErrors
        ):
            return True
        error = error.__cause__
    return False
