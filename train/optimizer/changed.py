"""Continuing a run with another algorithm than the one that its checkpoint was trained with."""

from collections.abc import Collection, Iterable

from train.checkpoint.coverage import matches
from train.checkpoint.manifest import Manifest
from train.optimizer.adamw import MOMENTS
from train.optimizer.config import OptimizerConfig
from train.optimizer.muon import MOMENTUM

# What may be missing and surplus, for a change to each kind.
WAYS_OUT = {
    "adamw": "checkpoint.allow_missing=[exp_avg*/*]",
    "muon": f"checkpoint.allow_missing=[{MOMENTUM}/*] checkpoint.allow_surplus=[exp_avg*/*]",
}


def check_algorithm(
    manifest: Manifest,
    wanted: Iterable[str],
    config: OptimizerConfig,
    *,
    allow_missing: Collection[str],
) -> None:
    """Refuse, with a ValueError, a checkpoint that lacks this optimizer's state.

    States that are allowed to be missing start from zero and count as old ones: AdamW does not
    correct its bias again, which makes its first steps smaller. Any precision of moments loads
    into any other.
    """
    for name in wanted:
        kind, _, parameter = name.partition("/")
        is_state = kind in (*MOMENTS, MOMENTUM) and f"weight/{parameter}" in manifest.tensors
        if is_state and name not in manifest.tensors and not matches(name, allow_missing):
            before = manifest.config.get("optimizer", {}).get("kind", "unknown")
            raise ValueError(
                f"optimizer.kind={config.kind} keeps {name}, which step {manifest.step}'s "
                f"checkpoint (optimizer.kind={before}) lacks; choose optimizer={before}, or keep "
                "weights and data position and start the missing state from zero with "
                f"{WAYS_OUT[config.kind]}"
            )
