"""Patience with file systems that fail for a while, or don't answer."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from data.arrivals import ARRIVALS
from data.failure import is_lasting

log = logging.getLogger(__name__)

T = TypeVar("T")
Arrived = Callable[[], None]
"""Called whenever a part of an answer has come."""


@dataclass(slots=True, kw_only=True)
class RetryConfig:
    #: How often reading is tried before the run saves and stops.
    attempts: int = 5
    #: Seconds before the second attempt; twice as many before each further one.
    wait_seconds: float = 1.0
    #: Seconds in which nothing comes of an answer after which a request to a file system behind a
    #: URL has failed; an answer may take longer while its parts come.
    timeout_seconds: float = 60.0


def check_retry(config: RetryConfig) -> None:
    """Raises ValueError where nothing would be tried."""
    if config.attempts < 1:
        raise ValueError(f"data.retry.attempts={config.attempts} must be at least 1; choose e.g. 5")
    if config.wait_seconds < 0:
        raise ValueError(
            f"data.retry.wait_seconds={config.wait_seconds} is negative; choose 0 or more"
        )
    if config.timeout_seconds <= 0:
        raise ValueError(
            f"data.retry.timeout_seconds={config.timeout_seconds} must be positive; choose e.g. 60"
        )


def longest_silence(config: RetryConfig, *, is_remote: bool) -> float:
    """Seconds in which reading may bring nothing at all before it fails for good."""
    silent = config.attempts * config.timeout_seconds if is_remote else 0.0
    return silent + config.wait_seconds * (2 ** (config.attempts - 1) - 1)


def retry(read: Callable[[], T], config: RetryConfig, *, forget: Callable[[], None]) -> T:
    """What `read` returns; after an OSError it is called again, once `forget` has dropped what
    may be stale.

    Raises:
        OSError: The last attempt's, or one that a further attempt would meet again.
    """
    wait = config.wait_seconds
    for attempt in range(1, config.attempts):
        try:
            return read()
        except OSError as error:
            if is_lasting(error):
                raise
            log.warning(
                "%s (attempt %d of %d; the next in %g s)", error, attempt, config.attempts, wait
            )
            forget()
            time.sleep(wait)
            wait *= 2
    return read()


def within(seconds: float, read: Callable[[Arrived], T], *, what: str) -> T:
    """What `read` returns, which is given up once nothing has come for so long. It runs in a
    thread of its own, because file systems have limits of their own or none; one that is late is
    left to itself.

    Raises:
        TimeoutError: It was silent; also an OSError.
    """
    result: Future[T] = Future()
    last = time.monotonic()

    def arrived() -> None:
        nonlocal last
        last = time.monotonic()
        ARRIVALS.note()

    def run() -> None:
        try:
            result.set_result(read(arrived))
            arrived()
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="within", daemon=True).start()
    while (left := last + seconds - time.monotonic()) > 0:
        try:
            return result.result(left)
        except TimeoutError:
            if result.done():  # it was `read` that raised it, or is done just now
                return result.result()
    raise TimeoutError(f"{what} has not answered within {seconds:g} s (data.retry.timeout_seconds)")
