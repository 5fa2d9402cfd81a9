"""Patience with file systems that fail for a while."""

import logging
import time
from collections.abc import Callable
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


def check_retry(config: RetryConfig) -> None:
    """Raises ValueError where nothing would be tried."""
    if config.attempts < 1:
        raise ValueError(f"data.retry.attempts={config.attempts} must be at least 1; choose e.g. 5")
    if config.wait_seconds < 0:
        raise ValueError(
            f"data.retry.wait_seconds={config.wait_seconds} is negative; choose 0 or more"
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
