"""Patience with file systems that fail for a while, or don't answer."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class RetryConfig:
    #: How often reading is tried before the run saves and stops.
    attempts: int = 5
    #: Seconds before the second attempt; twice as many before each further one.
    wait_seconds: float = 1.0
    #: Seconds after which a request to a file system behind a URL has failed.
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


def retry(read: Callable[[], T], config: RetryConfig, *, forget: Callable[[], None]) -> T:
    """What `read` returns; after an OSError it is called again, once `forget` has dropped what
    may be stale.

    Raises:
        OSError: The last attempt's.
    """
    wait = config.wait_seconds
    for attempt in range(1, config.attempts):
        try:
            return read()
        except OSError as error:
            log.warning(
                "%s (attempt %d of %d; the next in %g s)", error, attempt, config.attempts, wait
            )
            forget()
            time.sleep(wait)
            wait *= 2
    return read()


def within(seconds: float, read: Callable[[], T], *, what: str) -> T:
    """What `read` returns. It runs in a thread of its own, because file systems have limits of
    their own or none; one that is late is left to itself.

    Raises:
        TimeoutError: It takes longer; also an OSError.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(read())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="within", daemon=True).start()
    try:
        return result.result(seconds)
    except TimeoutError as error:
        if result.done():  # it was `read` that raised it, or is done just now
            return result.result()
        raise TimeoutError(
            f"{what} has not answered within {seconds:g} s (data.retry.timeout_seconds)"
        ) from error
