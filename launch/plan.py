"""`thrifty plan`: what a model has and costs, per component, before anything is started."""

import sys

from rich import box
from rich.console import Console
from rich.table import Table

from launch.settings.compose import Job, run_jobs, to_config, worst
from launch.settings.config import LaunchedRun
from model.config import ModelConfig
from model.cost import MTP, flops_by_component, parameters_by_component
from model.memory import routed_peak
from model.moe import MoEConfig
from train.config import RunConfig, check_run
from train.layout.memory import activations, largest_state
from train.layout.traffic import largest_traffic
from train.outcome import ExitCode
from train.precision import Dtype

GIB = 2**30
WIDTH = 100  # also where the output is no terminal

CONVENTIONS = """\
Active: parameters that one token meets: of the routed experts the chosen ones, {embedding}.
FLOPs: matrix products of training, forward and backward, with attention under the causal mask
at {seq_len:,} tokens (data.seq_len); recomputation is not counted."""


def main() -> ExitCode:
    """Print the plans that the command line asks for."""
    return worst(run_jobs(plan_job, schema=LaunchedRun))


def plan_job(job: Job) -> ExitCode:
    """Print one config's plan."""
    config = to_config(job.values, LaunchedRun)
    check_run(config, num_ranks=config.launch.processes)
    console = Console(width=WIDTH)
    console.print(draw_components(config.model, seq_len=config.data.seq_len))
    print(describe_conventions(config.model, seq_len=config.data.seq_len))
    print(describe_layout(config))
    if config.model.moe is not None and config.model.moe.max_tokens_per_chunk is not None:
        print(describe_bound(config, config.model.moe))
    return ExitCode.FINISHED


def draw_components(model: ModelConfig, *, seq_len: int) -> Table:
    """Parameters and FLOPs per token of each component, and of all; MTP is beside the total."""
    shares = parameters_by_component(model)
    flops = flops_by_component(model, seq_len=seq_len)
    mtp, mtp_flops = shares.pop(MTP), flops.pop(MTP)
    total = sum(share.total for share in shares.values())
    active = sum(share.active for share in shares.values())
    table = Table("component", box=box.SIMPLE)
    for heading in ("parameters", "share", "active", "GFLOPs/token", "share"):
        table.add_column(heading, justify="right")

    def add_row(name: str, parameters: int, met: int, cost: float) -> None:
        table.add_row(
            name,
            f"{parameters:,}",
            f"{parameters / total:.2%}",
            f"{met:,}",
            f"{cost / 1e9:,.3f}",
            f"{cost / sum(flops.values()):.2%}",
        )

    for name, share in shares.items():
        if share.total or flops[name]:
            add_row(name, share.total, share.active, flops[name])
    table.add_section()
    add_row("total", total, active, sum(flops.values()))
    if model.mtp.depth:
        add_row(f"MTP, depth {model.mtp.depth}", mtp.total, mtp.active, mtp_flops)
        add_row("with MTP", total + mtp.total, active + mtp.active, sum(flops.values()) + mtp_flops)
    return table


def describe_conventions(model: ModelConfig, *, seq_len: int) -> str:
    """What the table's columns count."""
    embedding = (
        "the embedding because it is the head" if model.tie_embedding else "without the embedding"
    )
    return CONVENTIONS.format(embedding=embedding, seq_len=seq_len)


def describe_layout(config: LaunchedRun) -> str:
    """What the layout keeps on its fullest rank, and sends in a step."""
    num_ranks = config.launch.num_ranks
    state = largest_state(config, num_ranks=num_ranks)
    sent = largest_traffic(config, num_ranks=num_ranks)
    sizes = {
        "weights": state.weights,
        "gradients": state.gradients,
        "masters and moments": state.optimizer,
        "activations of blocks": activations(config),
    }
    of_tokens = sent.experts + sent.sequences + sent.stages
    lines = [f"Ranks: {num_ranks}. On the fullest of them (docs/parallelism.md):"]
    lines += [f"  {name:22} {size / GIB:>10,.3f} GiB" for name, size in sizes.items()]
    if state.host:
        lines.append(f"  {'in host memory':22} {state.host / GIB:>10,.3f} GiB")
    if state.disk:
        lines.append(f"  {'on the disk':22} {state.disk / GIB:>10,.3f} GiB")
    lines.append(
        f"  {'sent in a step':22} {sent.total / GIB:>10,.3f} GiB, of it with tokens "
        f"{of_tokens / GIB:,.3f}"
    )
    return "\n".join(lines)


def describe_bound(config: RunConfig, moe: MoEConfig) -> str:
    """What `max_tokens_per_chunk` promises."""
    parallel = config.parallel
    is_bf16 = config.precision.dtype is Dtype.bf16
    elements = routed_peak(
        moe,
        dim=config.model.dim,
        tokens=parallel.micro_batch_size * config.data.seq_len // parallel.sequence,
        num_local=moe.num_experts // parallel.expert,
        is_fused=is_bf16,
    )
    size = elements * (2 if is_bf16 else 4) / 2**30
    return (
        f"A layer's routed experts take {size:,.2f} GiB at most on a rank, forward and backward,\n"
        f"whatever the routing (model.moe.max_tokens_per_chunk={moe.max_tokens_per_chunk})."
    )


if __name__ == "__main__":
    sys.exit(main())
