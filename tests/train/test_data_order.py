"""What a run reads while its ranks, blend, lengths and batches change, through real checkpoints."""

import inspect
import json
import textwrap
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

import train.loop
from data.blend import SourceConfig
from data.config import FilesData, MixtureData, Verify
from data.fim import NO_FIM
from data.manifest import Split
from data.mixture import Mixture
from data.packing import Packing
from data.permutation import Permutation
from data.prepare import prepare, tokenizer_path
from data.token_stream import TokenStream
from data.tokenizer import TokenizerConfig
from tests.data.orders import WINDOW, Setting, SlowOrder
from tests.ranks import run_ranks
from tests.train.tiny import tiny_model, tiny_run
from train.checkpoint.checkpoints import Checkpoints
from train.config import RunConfig
from train.engine.engine import join
from train.layout.parallel import ParallelConfig
from train.ranks import alone

STEPS = 2  # of each phase


class Phase(NamedTuple):
    """One start of the run: how many ranks, and all else that may change."""

    ranks: int
    weights: dict[str, float]
    seq_len: int = 16
    batch_size: int = 12
    packing: Packing = Packing.concatenate


BEFORE, AFTER = {"web": 0.7, "code": 0.3}, {"web": 0.2, "code": 0.8}
PHASES = [
    Phase(1, BEFORE),
    Phase(4, BEFORE),
    Phase(2, AFTER),
    Phase(3, AFTER),
    Phase(2, AFTER, seq_len=24),
    Phase(1, AFTER, seq_len=24, batch_size=4),
    Phase(2, {"code": 1.0}, seq_len=20, batch_size=8, packing=Packing.best_fit),
]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two of some dozens of short documents each, with one tokenizer."""
    folder = tmp_path_factory.mktemp("corpora")
    source = inspect.getsource(textwrap)
    tokenizer = TokenizerConfig(vocab_size=400)
    folders = {}
    for name, first in (("web", 0), ("code", 9000)):
        documents = [source[at : at + 20 + at % 90] for at in range(first, first + 7000, 150)]
        text = folder / f"{name}.jsonl"
        text.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        config = FilesData(
            folder=str(folder / name),
            paths=[str(text)],
            tokenizer=tokenizer,
            validation_fraction=0.2,
            processes=1,
        )
        prepare(config)
        folders[name] = folder / name
        tokenizer = TokenizerConfig(path=str(tokenizer_path(config)))
    return folders


def config_of(folder: Path, corpora: dict[str, Path], phase: Phase, *, steps: int) -> RunConfig:
    sources = [
        SourceConfig(name=name, folder=str(corpora[name]), weight=weight)
        for name, weight in phase.weights.items()
    ]
    data = MixtureData(
        sources=sources,
        seq_len=phase.seq_len,
        packing=phase.packing,
    )
    model = tiny_model(num_layers=1, moe=None, mtp=replace(tiny_model().mtp, depth=0))
    config = tiny_run(folder, data=data, model=model, parallel=ParallelConfig(micro_batch_size=1))
    config.schedule.steps, config.schedule.batch_size = steps, phase.batch_size
    config.evaluation.max_sequences = 2
    return config


def read_in_order(config: RunConfig, num_ranks: int) -> list[list[int]]:
    """Run the phase; the rows that the ranks have trained on, in the order of global batches."""
    update = train.loop.update

    def be_rank() -> list[list[list[list[int]]]]:
        steps = []

        def note(engine: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
            steps.append(
                [
                    [row[mask].tolist() for row, mask in zip(b.tokens, b.is_real, strict=True)]
                    for b in batches
                ]
            )
            return update(engine, batches, *args, **kwargs)

        with mock.patch.object(train.loop, "update", note):
            train.loop.train(config, join(config.parallel, timeout_minutes=5))
        return steps

    Path(config.run_dir).mkdir(exist_ok=True)
    small_windows = partial(Mixture, size_window=lambda _: WINDOW)
    with mock.patch("data.training_data.Mixture", small_windows):
        shares = run_ranks(num_ranks, be_rank, seconds=300)
    assert [len(share) for share in shares] == [STEPS] * num_ranks
    return [
        row
        for step in zip(*shares, strict=True)
        for micro_batch in zip(*step, strict=True)
        for rows in micro_batch
        for row in rows
    ]


class Reference:
    """The same run, one token at a time and all in memory."""

    def __init__(self, corpora: dict[str, Path], *, seed: int) -> None:
        self._seed = seed
        self._documents = {name: read_documents(folder) for name, folder in corpora.items()}
        lengths = {name: list(map(len, found)) for name, found in self._documents.items()}
        self._order = SlowOrder(lengths, seed=seed)
        self.read: Counter[tuple[str, int, int]] = Counter()  # source, place in its order, offset

    def rows(self, phase: Phase, *, is_new_blend: bool) -> list[list[int]]:
        if is_new_blend:
            self._order.change_blend()
        setting = Setting(phase.weights, phase.seq_len, phase.packing, NO_FIM)
        return [self._row(setting) for _ in range(STEPS * phase.batch_size)]

    def _row(self, setting: Setting) -> list[int]:
        name, tokens = self._order.next_row(setting)
        self.read.update((name, place, offset) for place, offset in tokens)
        return [self.document(name, place)[offset] for place, offset in tokens]

    def document(self, name: str, place: int) -> list[int]:
        """The tokens of the one at a place in its source's order, epoch after epoch."""
        documents = self._documents[name]
        epoch, at = divmod(place, len(documents))
        key = f"order {self._seed} {name} {epoch}".encode()
        return documents[int(Permutation(len(documents), key=key)(at))]


def read_documents(folder: Path) -> list[list[int]]:
    """The training split's tokens, cut before each bos."""
    stream = TokenStream(folder, Split.train, verify=Verify.full)
    documents: list[list[int]] = []
    for token in stream.read(0, len(stream)).tolist():
        if token == stream.tokenizer.bos_id:
            documents.append([])
        documents[-1].append(token)
    return documents


# Of a phase's fields those that a note of the blend holds, and the config's keys.
NOTED = {"weights": "data.sources", "seq_len": "data.seq_len", "packing": "data.packing"}
KEYS = NOTED | {"batch_size": "schedule.batch_size"}


@pytest.mark.slow
def test_no_document_is_read_twice_or_left_out_while_ranks_blend_and_lengths_change(
    corpora: dict[str, Path], tmp_path: Path
) -> None:
    first, *_ = PHASES
    reference = Reference(corpora, seed=config_of(tmp_path, corpora, first, steps=0).seed)
    samples, notes = 0, 0
    for number, (before, phase) in enumerate(pairwise([None, *PHASES]), start=1):
        assert phase is not None
        changed = {name for name in KEYS if getattr(before, name, None) != getattr(phase, name)}
        is_new = bool(changed & NOTED.keys())
        config = config_of(tmp_path, corpora, phase, steps=STEPS * number)
        expected = reference.rows(phase, is_new_blend=is_new)
        assert read_in_order(config, phase.ranks) == expected, phase

        manifest = Checkpoints(Path(config.run_dir)).choose(alone(), step=STEPS * number)
        data, notes = manifest.progress["data"], notes + is_new
        assert len(data["blends"]) == notes
        if is_new:
            assert data["blends"][-1]["samples"] == samples, "noted where it began"
        if before is not None:
            assert manifest.changes.keys() & KEYS.values() == {KEYS[name] for name in changed}
        samples += STEPS * phase.batch_size
        assert data["samples"] == samples

    assert set(reference.read.values()) == {1}, "a token was read twice"
    for name, position in data["sources"].items():
        for place in range(position["document"]):  # all that lies before the open window
            length = len(reference.document(name, place))
            assert all(reference.read[name, place, offset] for offset in range(length))
