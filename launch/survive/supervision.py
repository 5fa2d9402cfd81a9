"""How an unattended run is kept alive: what may be tried again, how often, with how few nodes."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class SupervisionConfig:
    #: Starts after the first one before `thrifty launch` gives up; a start that got further than
    #: the one before it does not count.
    max_restarts: int = 10
    #: Seconds before the first restart; doubled for each further one that got no further.
    backoff_seconds: float = 5.0
    #: Longest such wait.
    max_backoff_seconds: float = 300.0
    #: Fewest nodes with which the run may go on when others are lost; null: all of launch.nodes.
    min_nodes: int | None = None
    #: Failures of a node after which it is left out.
    max_node_failures: int = 2
    #: Seconds without a word from a node after which it counts as lost.
    lost_after_seconds: float = 20.0
    #: Seconds that ranks get to save after they were asked to stop; under Slurm at most
    #: launch.save_seconds.
    grace_seconds: float = 300.0


@dataclass(slots=True, kw_only=True)
class DoctorConfig:
    #: Whether `thrifty launch` examines the nodes before it starts the run.
    enabled: bool = True
    #: Least free memory of a node, in GB.
    min_memory_gb: float = 1.0
    #: Least free space where the run's folder lies, in GB.
    min_disk_gb: float = 1.0
    #: Largest difference between a node's clock and this one's.
    max_clock_skew_seconds: float = 2.0
    #: Whether rates between nodes are measured (seconds).
    bandwidth: bool = True
    #: Megabytes of one such measurement.
    bandwidth_megabytes: int = 32
    #: Least rate between any two nodes, in GB/s, both ways at once.
    min_bandwidth_gbps: float = 0.0


def check_supervision(config: SupervisionConfig) -> None:
    """Refuse, with a ValueError, numbers that make no rule."""
    key = "launch.supervision"
    for name in ("max_restarts", "backoff_seconds", "max_backoff_seconds"):
        if getattr(config, name) < 0:
            raise ValueError(f"{key}.{name}={getattr(config, name)} must not be negative")
    for name in ("max_node_failures", "lost_after_seconds", "grace_seconds"):
        if getattr(config, name) <= 0:
            raise ValueError(f"{key}.{name}={getattr(config, name)} must be positive")
    if config.min_nodes is not None and config.min_nodes < 1:
        raise ValueError(f"{key}.min_nodes={config.min_nodes} must be at least 1, or null")


def backoff(config: SupervisionConfig, failures: int) -> float:
    """Seconds to wait after the n-th failure in a row without progress."""
    return min(config.backoff_seconds * 2 ** max(failures - 1, 0), config.max_backoff_seconds)
