"""The training data of a run: its sources, opened, and the order in which they are read."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from data.blend import Blend, SourceConfig
from data.config import DataConfig, MixtureData, list_sources
from data.fim import FimSetting
from data.gather import Gather
from data.manifest import Split
from data.mixture import Drawn, Mixture, Row
from data.position import Position, SourcePosition
from data.prepared_corpus import PreparedCorpus, open_verified
from data.retry import retry
from data.rows import Rows, read_rows
from data.source import Source
from data.token_stream import TokenStream


class TrainingData:
    """Samples of the training split by position; see `Mixture.draw`.

    Raises:
        ValueError: A corpus is unfinished, corrupted or of another tokenizer than the others.
        OSError: What lies behind a URL can't be read, or its copies find no room.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        corpora: Sequence[PreparedCorpus] | None = None,
    ) -> None:
        """`corpora` are those of the config, where they are open already."""
        if corpora is None:
            corpora = open_verified(config)
        self._config = config
        self._seed = seed
        self._gather = Gather()
        self._identities: dict[str, str] = {}
        wanted = list_sources(config)
        sources = [
            self._open(source, corpus) for source, corpus in zip(wanted, corpora, strict=True)
        ]
        stages = config.stages if isinstance(config, MixtureData) else []
        weights = {source.name: source.weight for source in wanted}
        self.mixture = Mixture(
            sources,
            Blend(weights, stages),
            seq_len=config.seq_len,
            packing=config.packing,
            fim=FimSetting(config.fim.rate, config.fim.mode),
        )
        assert sources[0].stream is not None
        self.tokenizer = sources[0].stream.tokenizer

    def draw(self, position: Position, count: int) -> Drawn[Row]:
        """The samples that follow a position; see `Mixture.draw`."""
        return self.mixture.draw(position, count)

    def read(self, rows: Sequence[Row], batch_size: int) -> list[Rows]:
        """The content of drawn rows in batches of so many; see `read_rows`.

        Raises:
            OSError: A shard can't be read, often enough in a row; it is named.
        """
        return retry(lambda: self._read(rows, batch_size), self._config.retry, forget=self._forget)

    def _read(self, rows: Sequence[Row], batch_size: int) -> list[Rows]:
        return read_rows(
            rows,
            self.mixture.sources,
            self._gather,
            batch_size=batch_size,
            seq_len=self._config.seq_len,
            pad_id=self.tokenizer.pad_id,
            mask_documents=self._config.mask_documents,
            reset_positions=self._config.reset_positions,
        )

    def _forget(self) -> None:
        """Have shards opened anew."""
        for source in self.mixture.sources.values():
            assert source.stream is not None
            source.stream.close()

    def enter(self, position: Position) -> Position:
        """The position as this config goes on from it: with a note of the blend if it is new.

        Raises:
            ValueError: A source's corpus is not the one that was read so far.
        """
        blend = self._describe()
        for before in position.blends:
            for name, about in before["sources"].items():
                now = self._identities.get(name, about["corpus"])
                if now != about["corpus"]:
                    raise ValueError(
                        f"the source {name} is another corpus than the one this run has read "
                        f"({now[:12]}, was {about['corpus'][:12]}); give the new one a name of its "
                        "own in data.sources, or put the old one back"
                    )
        settings = {key: value for key, value in blend.items() if key != "samples"}
        if position.blends and settings.items() <= position.blends[-1].items():
            return position
        sources = {name: replace(at, credit=0) for name, at in position.sources.items()}
        for name in self.mixture.sources:
            sources.setdefault(name, SourcePosition())
        noted = {"samples": position.samples, **settings}
        return replace(position, sources=sources, blends=(*position.blends, noted))

    def _open(self, source: SourceConfig, corpus: PreparedCorpus) -> Source:
        folder, manifest = corpus.folder, corpus.manifest
        if corpus.remote is not None:
            corpus.remote.refuse_without_room(manifest)
        stream = TokenStream(folder, Split.train, verify=self._config.verify, remote=corpus.remote)
        self._identities[source.name] = manifest.train.fingerprint
        record, tokenizer, fim = manifest.train, manifest.tokenizer, self._config.fim
        if fim.rate > 0 and tokenizer.fim is None:
            raise ValueError(
                f"data.fim.rate={fim.rate} needs markers that the tokenizer of {folder} lacks; "
                "train one here, use one with FIM tokens, or set data.fim.rate=0"
            )
        if record.tokens == 0:
            raise ValueError(f"the corpus in {folder} has no token to train on; leave it out")
        return Source(
            source.name,
            corpus.open_index(Split.train),
            stream,
            seed=self._seed,
            max_epochs=source.max_epochs,
            fim_ids=tokenizer.fim,
        )

    def _describe(self) -> dict[str, Any]:
        """What decides the order from here on, as plain values."""
        config = self._config
        sources = {
            source.name: {
                "corpus": self._identities[source.name],
                "weight": source.weight,
                "max_epochs": source.max_epochs,
            }
            for source in list_sources(config)
        }
        return {
            "seed": self._seed,
            "seq_len": config.seq_len,
            "packing": config.packing.value,
            "fim": {"rate": config.fim.rate, "mode": config.fim.mode.value},
            "sources": sources,
            "stages": [asdict(stage) for stage in getattr(config, "stages", [])],
        }
