"""Random kill -9 at any moment, again and again: the run ends as one that nobody touched."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.train.tiny import tiny_run
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.integrity import verify_files
from train.checkpoint.manifest import read_manifest
from train.config import RunConfig
from train.engine.engine import join
from train.journal import read_records
from train.layout.parallel import ParallelConfig
from train.loop import train

NUMBERS = ("loss", "mtp_loss_1", "grad_norm", "max_vio", "samples", "targets")
RANKS = 2


def be_rank(config: RunConfig, rank: int, store: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), RANKS), rank=rank, world_size=RANKS
    )
    train(config, join(config.parallel, timeout_minutes=5))
    os._exit(0)


def start(config: RunConfig, store: Path) -> list[Any]:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=be_rank, args=(config, r, store)) for r in range(RANKS)]
    for rank in ranks:
        rank.start()
    return ranks


def num_steps(config: RunConfig) -> int:
    path = Path(config.run_dir) / "metrics.jsonl"
    return path.read_text().count('"event": "step"') if path.exists() else 0


def stop_by_kill(ranks: list[Any], config: RunConfig, dice: random.Random) -> bool:
    """Kill one rank or all once some steps are done and a moment has passed; False: it ended."""
    wanted = num_steps(config) + dice.randrange(1, 5)
    while num_steps(config) < wanted and all(rank.is_alive() for rank in ranks):
        time.sleep(0.01)
    time.sleep(dice.random() * 0.08)
    victims = ranks if dice.random() < 0.5 else [dice.choice(ranks)]
    was_running = all(rank.is_alive() for rank in ranks)
    for victim in victims:
        if victim.is_alive():
            os.kill(victim.pid, signal.SIGKILL)
    for rank in ranks:
        rank.join(60)
        assert not rank.is_alive(), "a rank outlives the death of another"
    return was_running


def check_what_is_left(config: RunConfig) -> None:
    """Every folder without `.partial` is whole."""
    checkpoints = Checkpoints(Path(config.run_dir))
    for step in checkpoints.steps():
        verify_files(checkpoints.path(step), read_manifest(checkpoints.path(step)))


def read_curve(config: RunConfig) -> dict[int, list[float]]:
    records = read_records(Path(config.run_dir), event="step")
    curve = {record["step"]: [record[key] for key in NUMBERS] for record in records}
    assert len(curve) == len(records), "a step is recorded twice"
    return curve


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "steps"), [(2, 12), (100, 300)])
def test_a_run_that_is_killed_at_random_equals_one_that_is_not(
    corpus: Path, tmp_path: Path, kills: int, steps: int
) -> None:
    configs = []
    for name in ("undisturbed", "killed"):
        parallel = ParallelConfig(expert=2, micro_batch_size=4)
        config = tiny_run(tmp_path / name, parallel=parallel)
        config.data.folder = str(corpus)
        config.schedule.steps = steps
        config.checkpoint.every = 1
        config.checkpoint.keep = 3
        config.evaluation.every = steps
        Path(config.run_dir).mkdir(parents=True)
        configs.append(config)
    undisturbed, killed = configs
    for rank in start(undisturbed, tmp_path / "store"):
        rank.join()
    dice, number = random.Random(0), 0
    for number in range(kills):
        if not stop_by_kill(start(killed, tmp_path / f"store-{number}"), killed, dice):
            break
        check_what_is_left(killed)
    for rank in start(killed, tmp_path / "store-last"):
        rank.join()
        assert rank.exitcode == 0
    assert number == kills - 1, f"the run ended after {number} kills: give it more steps"
    assert read_curve(killed) == read_curve(undisturbed)
    for rank in range(RANKS):
        name = f"checkpoints/step-{steps:08}/rank-{rank:05}.safetensors"
        one, other = (Path(config.run_dir) / name for config in configs)
        assert one.read_bytes() == other.read_bytes()
    assert list((Path(killed.run_dir) / "checkpoints").glob("*.partial")) == []
