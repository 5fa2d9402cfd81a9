"""What a node's agent is told to start. It travels through the agent's standard input, so that
nothing of it (a key for wandb, say) stands on a command line, and no shell reads it."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from launch.nodes.node_ranks import World

# Variables of the launching process that ranks on other nodes get as well.
PASSED = re.compile(
    r"^(NCCL|GLOO|TORCH|CUDA|DS|WANDB|HF|FI|UCX|OMP|MKL|KMP|TRITON|PYTORCH|THRIFTY|LC)_|^LANG$"
)
RUN_VARIABLE = "THRIFTY_RUN"  # in the environment of every process of a launch: its id
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


@dataclass(slots=True, kw_only=True)
class Order:
    run_dir: str
    run_id: str  # the same for all attempts of one launch
    attempt: int
    hosts: list[str]  # of the nodes, in order
    node: int
    processes: int  # ranks of each node
    address: str  # of the first node
    port: int
    interface: str | None  # null: the one that leads to `address`
    threads: int | None  # of each rank; null: the node's cores shared out
    lost_after_seconds: float  # without a word from the launcher, after which the ranks end
    grace_seconds: float
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def world(self) -> World:
        return World(self.hosts, self.node, self.processes, self.address, self.port)


def encode(order: Order) -> str:
    """One line of text."""
    return json.dumps(asdict(order))


def decode(line: str) -> Order:
    return Order(**json.loads(line))


def passed_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Of this process's environment what concerns ranks elsewhere."""
    return {name: value for name, value in environment.items() if PASSED.match(name)}


def without_secrets(order: Order) -> dict[str, object]:
    """The order for a person's eyes."""
    values = asdict(order)
    values["environment"] = {
        name: "(secret)" if SECRET.search(name) else value
        for name, value in order.environment.items()
    }
    return values
