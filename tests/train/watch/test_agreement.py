"""The self check: every kind of disagreement stops all ranks, with names."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from data.position import Position
from tests.ranks import run_ranks
from tests.train.tiny import tiny_run
from train.config import RunConfig, describe_config
from train.engine.engine import Engine, join
from train.journal import Journal
from train.layout.parallel import ParallelConfig
from train.progress import Progress
from train.ranks import Ranks
from train.run import Run
from train.watch.agreement import DisagreementError, check_agreement, hash_tensor


@contextmanager
def nudged(tensor: torch.Tensor) -> Iterator[None]:
    """One element's last bit flipped."""
    bits = tensor.detach().view(-1)[-1:].view(torch.int32)
    bits ^= 1
    yield
    bits ^= 1


def start(config: RunConfig, ranks: Ranks) -> None:
    Run(config, ranks)


def expect(message: str, check: Callable[[], None]) -> None:
    with pytest.raises(DisagreementError, match=message):
        check()


def test_every_kind_of_disagreement_is_refused_with_ranks_and_subject(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, parallel=ParallelConfig(expert=2, micro_batch_size=2))

    def disagree() -> None:
        ranks = join(config.parallel, timeout_minutes=5)
        engine = Engine(config, ranks)
        progress, values = Progress(step=3, data=Position(samples=24)), describe_config(config)
        is_odd = ranks.rank == 1

        def check() -> None:
            check_agreement(engine, progress, values, ranks)

        check()  # nothing differs
        if is_odd:
            values["model"]["dim"] = 64
        expect(r"at step 3: the config: model.dim is 32 on ranks 0, 2, 3 but 64 on rank 1$", check)
        values = describe_config(config)

        progress.data = Position(samples=24 + is_odd)
        expect(r"the data position: data.samples is 24 on ranks 0, 2, 3 but 25 on rank 1$", check)
        progress.data = Position(samples=24)

        def other(name: str) -> str:
            return "0.0" if name == "torch" and is_odd else "1.0"

        with mock.patch("train.watch.agreement.version", other):
            expect(r"versions: torch is 1.0 on ranks 0, 2, 3 but 0.0 on rank 1$", check)

        nowhere: Any = torch.zeros(1)
        layer = engine.model.layers[1].ffn
        for tensor, subject, where in (
            (engine.model.norm.weight, "weights: weight/norm.weight", "ranks 0, 2, 3 but"),
            (layer.router.bias, "weights: buffer/layers.1.ffn.router.bias", "ranks 0, 2, 3 but"),
            (layer.experts.up, r"experts.*: weight/layers.1.ffn.experts.up", "but .* on rank 3"),
        ):
            with nudged(tensor if is_odd else nowhere):
                expect(f"{subject}.* is .*{where}", check)
        check()

    run_ranks(4, disagree)


def test_a_run_says_who_sits_where_and_checks_at_its_start_and_at_each_checkpoint(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_run(tmp_path, parallel=ParallelConfig(expert=2, micro_batch_size=2))
    config.data.folder = str(corpus)
    Path(config.run_dir).mkdir()

    def start_and_drift() -> None:
        ranks = join(config.parallel, timeout_minutes=5)
        with caplog.at_level("INFO"):
            run = Run(config, ranks)
        grid = (
            "rank  node  replica  expert group  experts\n   0     0        0             0      0-3"
        )
        assert grid in caplog.text
        run.progress.step += 1
        is_odd = ranks.rank == 1
        with nudged(run.engine.model.norm.weight if is_odd else torch.zeros(1)):
            expect("step 1: weights: weight/norm", lambda: run.save(Journal([]), is_last=True))
        config.logging.every += is_odd
        expect("step 0: the config: logging.every is 1 .*but 2 on", lambda: start(config, ranks))

    run_ranks(2, start_and_drift, seconds=300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hash_changes_with_one_bit_and_with_the_order(dtype: torch.dtype) -> None:
    values = torch.randn(5000).to(dtype)
    with mock.patch("train.watch.agreement.BLOCK", 1024):
        before = hash_tensor(values)
        swapped = values.clone()
        swapped[[7, 2048]] = values[[2048, 7]]
        assert hash_tensor(swapped) != before
        bits = values.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
        bits[4999] ^= 1
        assert hash_tensor(values) != before
        bits[4999] ^= 1
        assert hash_tensor(values) == before
