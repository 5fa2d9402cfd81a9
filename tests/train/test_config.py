"""The resolved config on its way to the ranks, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from data.config import StdlibData
from model.moe import MoEConfig
from model.router import RouterConfig
from tests.train.tiny import tiny_model, tiny_run
from train.config import RunConfig, check_run, read_config, write_config
from train.layout.parallel import ParallelConfig
from train.schedule import BatchRampConfig, ConstantSchedule, WSDSchedule


def test_a_written_config_reads_back_equal_with_its_kinds(tmp_path: Path) -> None:
    config = tiny_run(
        tmp_path, schedule=WSDSchedule(steps=6, batch_size=8, peak_lr=1e-2, decay_steps=2)
    )
    config.data = StdlibData(folder="corpus", include_tests=True)
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml", RunConfig) == config


def test_ranks_ignore_the_launchers_group_but_no_other_key(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_config(tiny_run(tmp_path), path)
    text = path.read_text()
    path.write_text(text + "launch:\n  kind: local\n")
    assert read_config(path, RunConfig) == tiny_run(tmp_path)
    path.write_text(text + "lauch: {}\n")
    with pytest.raises(ValueError, match="lauch"):
        read_config(path, RunConfig)


def test_a_missing_config_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.yaml is no config of a run"):
        read_config(tmp_path / "config.yaml", RunConfig)


def moe(**changes: Any) -> dict[str, Any]:
    values = {"num_experts": 8, "top_k": 2, "expert_dim": 16, "router": RouterConfig()}
    return {"model": tiny_model(moe=MoEConfig(**values | changes))}


def schedule(**changes: Any) -> dict[str, Any]:
    return {"schedule": ConstantSchedule(**{"steps": 6, "batch_size": 8, "peak_lr": 1} | changes)}


MISTAKES: dict[str, tuple[dict[str, Any], int, str]] = {
    "more choices than experts": (
        moe(top_k=9),
        1,
        r"model.moe.top_k=9 exceeds model.moe.num_experts=8; choose top_k <= num_experts",
    ),
    "experts not divisible by EP": (
        {
            **moe(num_experts=9),
            "parallel": ParallelConfig(expert=2, micro_batch_size=1),
        },
        2,
        r"model.moe.num_experts=9 is not divisible by parallel.expert=2; choose .* \[1\]",
    ),
    "EP that does not divide the ranks": (
        {"parallel": ParallelConfig(expert=3, micro_batch_size=1)},
        4,
        r"parallel.expert=3 does not divide the 4 ranks; choose one of \[1, 2, 4\]",
    ),
    "groups that do not divide": (
        moe(router=RouterConfig(num_groups=3)),
        1,
        r"model.moe.router.num_groups=3 does not divide model.moe.num_experts=8",
    ),
    "a batch that ranks can't share": (
        schedule(batch_size=10),
        1,
        r"schedule.batch_size=10 is not divisible by parallel.micro_batch_size=4 times 1 ranks; "
        r"choose a multiple of 4",
    ),
    "a ramp whose levels ranks can't share": (
        schedule(batch_ramp=BatchRampConfig(start=4, steps=2, increment=2)),
        1,
        r"schedule.batch_ramp.increment=2 is not divisible",
    ),
    "a ZeRO stage that there isn't": (
        {"parallel": ParallelConfig(zero_stage=4, micro_batch_size=4)},
        1,
        r"parallel.zero_stage=4 does not exist; choose one of \[0, 1, 2, 3\]",
    ),
    "MTP of negative depth": (
        {"model": tiny_model(mtp=type(tiny_model().mtp)(depth=-1))},
        1,
        r"model.mtp.depth=-1",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_impossible_combinations_are_refused_with_key_value_and_way_out(
    tmp_path: Path, mistake: str
) -> None:
    changes, num_ranks, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        check_run(tiny_run(tmp_path, **changes), num_ranks=num_ranks)
