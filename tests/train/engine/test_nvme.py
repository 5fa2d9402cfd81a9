"""State that waits on a disk: where it lies, that it trains the same bits, and what is refused."""

import threading
from pathlib import Path
from typing import Any, Self

import bitsandbytes  # noqa: F401  (once, before ranks fork)
import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.train.tiny import random_batches, tiny_model, tiny_run
from tests.train.trained import train_layout
from train.checkpoint.checkpoints import CheckpointConfig
from train.config import RunConfig, check_run
from train.engine.engine import Engine, join
from train.engine.nvme import Disk
from train.engine.sharded import Sharded
from train.layout.memory import State, largest_state
from train.layout.parallel import Offload, ParallelConfig
from train.optimizer.config import OptimizerConfig
from train.optimizer.moments import Moments
from train.precision import Dtype, PrecisionConfig
from train.update import count_denominators, update

ON_DISK = {"offload_optimizer": Offload.nvme, "offload_parameters": Offload.nvme}


def config_of(folder: Path, *, dtype: Dtype = Dtype.fp32, **layout: Any) -> RunConfig:
    return tiny_run(
        folder,
        parallel=ParallelConfig(micro_batch_size=4, zero_stage=3, **layout),
        precision=PrecisionConfig(dtype=dtype),
        checkpoint=CheckpointConfig(asynchronous=False),
    )


class WatchedMemory(threading.Thread):
    """Within it: the most memory of its own (no file's) that this process has, beyond the first."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ends = threading.Event()
        self._first = self._read()
        self.most = 0

    def _read(self) -> int:
        (line,) = (
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("RssAnon")
        )
        return int(line.split()[1]) * 1024

    def run(self) -> None:
        while not self._ends.wait(0.002):
            self.most = max(self.most, self._read() - self._first)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self.join()


def files_mapped(folder: Path) -> list[range]:
    """The addresses at which this process has files of a folder."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        if path.startswith(str(folder)):
            found.append(range(*(int(address, 16) for address in addresses.split("-"))))
    return found


def state_tensors(engine: Engine) -> dict[str, list[Tensor]]:
    """All that the engine keeps of parameters, of whichever form."""
    sharding = engine._sharding
    assert isinstance(sharding, Sharded)
    zero = sharding._zero
    states = [engine._optimizer.state[master] for master in sharding.masters()]
    return {
        "masters": sharding.masters(),
        "moments": [
            kept for state in states for name, kept in state.items() if name.startswith("exp_avg")
        ],
        "gradients": [master.grad for master in sharding.masters() if master.grad is not None],
        "weights": [part for group in zero.fp16_partitioned_groups for part in group],
    }


@pytest.mark.parametrize(
    "moments",
    [pytest.param(m, marks=[] if m is Moments.bf16 else pytest.mark.slow) for m in Moments],
)
def test_all_that_is_kept_of_parameters_lies_on_the_disk(tmp_path: Path, moments: Moments) -> None:
    config = config_of(tmp_path, dtype=Dtype.bf16, nvme_path=str(tmp_path), **ON_DISK)
    config.optimizer = OptimizerConfig(moments=moments)
    check_run(config, num_ranks=1)

    def be_rank() -> None:
        engine = Engine(config, join(config.parallel, timeout_minutes=5))
        mapped = files_mapped(tmp_path)
        for kind, tensors in state_tensors(engine).items():
            assert tensors, kind
            for tensor in tensors:
                assert any(tensor.data_ptr() in addresses for addresses in mapped), kind
        assert not list(tmp_path.iterdir()), "its files have no names, so that none stays"

    run_ranks(1, be_rank)


@pytest.mark.slow
def test_at_no_time_does_host_memory_hold_what_goes_to_the_disk(tmp_path: Path) -> None:
    """At the start and in a step; the disk's own pages, which the kernel may drop, not counted."""

    def most(where: Offload) -> int:
        config = config_of(
            tmp_path,
            dtype=Dtype.bf16,
            offload_optimizer=where,
            offload_parameters=where,
            nvme_path=str(tmp_path),
        )
        config.model = tiny_model(dim=256, ffn_dim=16384)

        def be_rank() -> int:
            ranks = join(config.parallel, timeout_minutes=5)
            with WatchedMemory() as memory:
                engine = Engine(config, ranks)
                batches = random_batches(0, rank=0, num_ranks=1, micro_batch_size=4)
                over = count_denominators(batches, config.model, ranks)
                update(engine, batches, over, config=config.model, lr=1e-4)
            return memory.most

        check_run(config, num_ranks=1)
        planned.append(largest_state(config, num_ranks=1))
        return run_ranks(1, be_rank, seconds=600)[0]

    planned: list[State] = []
    in_memory, on_disk = most(Offload.cpu), most(Offload.nvme)
    assert in_memory >= planned[0].host
    assert on_disk < in_memory - 0.7 * planned[1].disk


@pytest.mark.parametrize(
    ("more", "on_disk"),
    [
        ({"expert": 2, "accumulation": 2}, ON_DISK),
        *(
            pytest.param(more, where, marks=pytest.mark.slow)
            for more, where in (
                ({"dtype": Dtype.bf16}, ON_DISK),
                ({"expert": 2}, {"offload_optimizer": Offload.nvme}),
                ({"expert": 2, "dtype": Dtype.bf16}, {"offload_parameters": Offload.nvme}),
                ({"optimizer": OptimizerConfig(moments=Moments.bf16)}, ON_DISK),
                ({"optimizer": OptimizerConfig(moments=Moments.int8)}, ON_DISK),
            )
        ),
    ],
)
def test_state_on_the_disk_trains_the_same_bits_as_in_host_memory(
    tmp_path: Path, more: dict[str, Any], on_disk: dict[str, Offload]
) -> None:
    on_host = dict.fromkeys(on_disk, Offload.cpu)
    expected = train_layout(tmp_path / "host", 2, zero_stage=3, **more, **on_host)
    got = train_layout(
        tmp_path / "disk", 2, zero_stage=3, **more, **on_disk, nvme_path=str(tmp_path)
    )
    assert torch.equal(got.losses, expected.losses)
    assert torch.equal(got.norms, expected.norms)
    assert got.state.keys() == expected.state.keys()
    for name, tensor in expected.state.items():
        assert torch.equal(got.state[name], tensor), name


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_path_that_is_no_folder_is_refused_at_the_start(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"parallel.nvme_path=.* can't be written to .*; give a"):
        Disk(tmp_path / name, needed=1, num_ranks=1)


def test_a_disk_too_small_for_all_ranks_of_a_node_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parallel.nvme_path=.* 2 ranks on this node need"):
        Disk(tmp_path, needed=2.0**60, num_ranks=2)


def test_a_disk_that_is_full_is_noticed_before_the_first_step(tmp_path: Path) -> None:
    disk = Disk(tmp_path, needed=1, num_ranks=1)
    with pytest.raises(ValueError, match=r"parallel.nvme_path=.*: no room for .* GiB more"):
        disk.empty(2**55, torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nvme_path": None}, r"offload_optimizer=nvme and .*nvme_path=null.*; choose a folder"),
        ({"zero_stage": 2}, r"zero_stage=2 and .*nvme.*; choose parallel.zero_stage=3"),
    ],
)
def test_what_a_disk_needs_is_asked_for_with_a_way_out(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = config_of(tmp_path, nvme_path=str(tmp_path), offload_optimizer=Offload.nvme)
    check_run(config, num_ranks=2)
    for name, value in changes.items():
        setattr(config.parallel, name, value)
    with pytest.raises(ValueError, match=message):
        check_run(config, num_ranks=2)


def test_checkpoints_that_copy_the_state_into_host_memory_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, nvme_path=str(tmp_path), offload_optimizer=Offload.nvme)
    config.checkpoint.asynchronous = True
    with pytest.raises(ValueError, match=r"choose checkpoint.asynchronous=false"):
        check_run(config, num_ranks=2)
