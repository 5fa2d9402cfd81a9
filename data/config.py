"""What can be asked of a corpus: where its text comes from, how it is stored and how it is read.

One class per kind of source; `kind` tells them apart in a resolved YAML file.
"""

import os
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from data.blend import SourceConfig, StageConfig, check_blend
from data.credentials import refuse_credentials
from data.fim import FimConfig, check_fim
from data.mirror import is_remote, mirror_folder
from data.packing import Packing
from data.retry import RetryConfig, check_retry
from data.select import SelectConfig, check_select
from data.template import parse_template
from data.tokenizer import TokenizerConfig, check_tokenizer


class Verify(StrEnum):
    """How much of a corpus is read again before it is trusted."""

    full = "full"  # sizes and sha256 of every file
    fast = "fast"  # sizes only


class Format(StrEnum):
    """How documents lie in a file."""

    auto = "auto"  # by the file's name
    text = "text"  # one document per file
    jsonl = "jsonl"  # one JSON object per line
    parquet = "parquet"  # one document per row
    arrow = "arrow"  # likewise; a file or a stream, as `datasets` keeps them


class Damaged(StrEnum):
    """What is done about a document that cannot be read."""

    refuse = "refuse"  # stop, and say where it is
    leave_out = "leave_out"  # go on, and count it in the report


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """What every kind of corpus has in common."""

    #: Which kind of corpus this is: stdlib, files, hub, tokenized or mixture.
    kind: str
    #: Folder that holds the prepared corpus: tokenizer, shards, manifest; or the URL of such a
    #: folder's copy, which is only read. A mixture needs none.
    folder: str
    #: The tokenizer: an existing file or how one is trained.
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    #: Tokens of one training sequence.
    seq_len: int = 4096
    #: Share of the documents held out for validation, chosen by the hash of their text.
    validation_fraction: float = 0.02
    #: UTF-8 bytes of text that go into one shard; a killed prepare loses at most its open shards.
    shard_bytes: int = 64 * 2**20
    #: Worker processes that tokenize; none given: one per core.
    processes: int | None = None
    #: Which documents are kept: quality filters, duplicates.
    select: SelectConfig = field(default_factory=SelectConfig)
    #: How documents fill sequences: concatenate (cut where one ends) or best_fit (kept whole
    #: wherever possible, padded).
    packing: Packing = Packing.concatenate
    #: Fill in the middle, in training only.
    fim: FimConfig = field(default_factory=FimConfig)
    #: No attention and no targets across documents.
    mask_documents: bool = True
    #: Positions count from 0 again in every document.
    reset_positions: bool = True
    #: Patience with a file system that fails while a run reads.
    retry: RetryConfig = field(default_factory=RetryConfig)
    #: Bytes of local disk that the tokens (.bin) of one remote source's training shards may take;
    #: what does not fit is read from afar. Held-out text and small files come on top of it.
    cache_bytes: int = 100 * 2**30
    #: What is checked before a prepared corpus is used: full (sha256) or fast (sizes).
    verify: Verify = Verify.full


@dataclass(slots=True, kw_only=True)
class StdlibData(DataConfig):
    """The source of the running Python's standard library: a corpus that every machine has."""

    kind: str = "stdlib"
    #: Read the library's own tests too (31 MB instead of 13 MB).
    include_tests: bool = False


@dataclass(slots=True, kw_only=True)
class FilesData(DataConfig):
    """Local files, each perhaps compressed: .gz, .bz2, .xz or .zst."""

    kind: str = "files"
    #: Glob patterns (`**` for any depth); each must match at least one file.
    paths: list[str]
    #: Key or column that holds the text in jsonl and parquet files.
    text_column: str = "text"
    #: Text out of several columns instead, such as '{title}: {body}'.
    template: str | None = None
    #: Text that stands before the document and that no loss is taken on, such as '{question}'.
    prompt_template: str | None = None
    #: auto, text, jsonl, parquet or arrow.
    format: Format = Format.auto
    #: A document that is not UTF-8, not JSON, or has no text_column: refuse it (stop, and say
    #: where it is) or leave_out (count it in the report).
    damaged: Damaged = Damaged.refuse


@dataclass(slots=True, kw_only=True)
class HubData(DataConfig):
    """A data set by its name on the Hugging Face hub, or a folder that `datasets` can load."""

    kind: str = "hub"
    #: Name on the hub, such as `allenai/c4`, or a local folder.
    name: str
    #: Subset (also called configuration) of the data set.
    subset: str | None = None
    #: Split of the data set that is read.
    split: str = "train"
    #: Column that holds the text.
    text_column: str = "text"
    #: Text out of several columns instead, such as '{title}: {body}'.
    template: str | None = None
    #: Text that stands before the document and that no loss is taken on, such as '{question}'.
    prompt_template: str | None = None
    #: Commit, tag or branch; give a commit, or a change on the hub goes unnoticed.
    revision: str | None = None
    #: Read over the network while tokenizing instead of downloading everything first.
    streaming: bool = False


@dataclass(slots=True, kw_only=True)
class TokenizedData(DataConfig):
    """What Megatron (.bin with .idx) or datatrove (.ds with .ds.index) tools have tokenized."""

    kind: str = "tokenized"
    #: Glob patterns of the .bin or .ds files to train on.
    paths: list[str]
    #: Glob patterns of those that are held out.
    validation_paths: list[str]


@dataclass(slots=True, kw_only=True)
class MixtureData(DataConfig):
    """Prepared corpora of one tokenizer, read in turns."""

    kind: str = "mixture"
    #: Not used: a mixture keeps nothing of its own. (Runs begun by earlier versions name one.)
    folder: str = ""
    #: The corpora: name (of your choice), folder, weight and max_epochs of each.
    sources: list[SourceConfig]
    #: Other weights from so many tokens on, in order: from_tokens, weights, ramp_tokens of each.
    stages: list[StageConfig] = field(default_factory=list)


DATA_KINDS: dict[str, type[DataConfig]] = {
    "stdlib": StdlibData,
    "files": FilesData,
    "hub": HubData,
    "tokenized": TokenizedData,
    "mixture": MixtureData,
}


def check_data(config: DataConfig) -> None:
    """Raises ValueError, with key, value, rule and way out, where values do not fit together."""
    if DATA_KINDS.get(config.kind) is not type(config):
        raise ValueError(
            f"data.kind={config.kind} does not belong to {type(config).__name__}; "
            f"choose the kind with data=NAME, NAME one of {', '.join(DATA_KINDS)}"
        )
    for key, text in list_places(config).items():
        refuse_credentials(key, text)
    if not config.folder and not isinstance(config, MixtureData):
        raise ValueError("data.folder is empty; name the folder that will hold the corpus")
    if is_remote(config.folder) and isinstance(config, MixtureData):
        raise ValueError(
            f"data.folder={config.folder} is a URL, but a mixture has no corpus of its own; name "
            "URLs in data.sources"
        )
    if config.cache_bytes < 0:
        raise ValueError(f"data.cache_bytes={config.cache_bytes} is negative; choose 0 or more")
    if config.seq_len < 1:
        raise ValueError(f"data.seq_len={config.seq_len} must be at least 1; choose e.g. 4096")
    if not 0 < config.validation_fraction < 1:
        raise ValueError(
            f"data.validation_fraction={config.validation_fraction} must lie in (0, 1); "
            "choose e.g. 0.02"
        )
    if config.shard_bytes < 1:
        raise ValueError(
            f"data.shard_bytes={config.shard_bytes} must be positive; choose e.g. 67108864"
        )
    if config.processes is not None and config.processes < 1:
        raise ValueError(
            f"data.processes={config.processes} must be positive; choose null for one per core"
        )
    check_fim(config.fim)
    check_retry(config.retry)
    check_select(config.select)
    if isinstance(config, MixtureData):
        check_blend(config.sources, config.stages)
    if isinstance(config, FilesData | HubData):
        for key in ("template", "prompt_template"):
            if (template := getattr(config, key)) is not None:
                parse_template(template, key=f"data.{key}")
    if isinstance(config, FilesData) and not config.paths:
        raise ValueError("data.paths is empty; give glob patterns, e.g. data.paths=['text/*.txt']")
    if isinstance(config, TokenizedData | MixtureData) and config.select.is_asked_for:
        raise ValueError(
            f"data.select has no meaning for data={config.kind}, whose documents are tokenized "
            "already; select when their text is prepared"
        )
    if isinstance(config, TokenizedData) and config.tokenizer.path is None:
        raise ValueError(
            "data.tokenizer.path=null, but data=tokenized needs the tokenizer that its files were "
            "made with; give its tokenizer.json or .model"
        )
    if isinstance(config, HubData) and not config.name:
        raise ValueError("data.name is empty; give a data set's name or a local folder")
    check_tokenizer(config.tokenizer)


def list_places(config: DataConfig) -> dict[str, str]:
    """All that says where something lies, by its key."""
    places = {"data.folder": config.folder, "data.tokenizer.path": config.tokenizer.path or ""}
    match config:
        case MixtureData():
            for number, source in enumerate(config.sources):
                places[f"data.sources[{number}].folder"] = source.folder
        case FilesData():
            places["data.paths"] = " ".join(config.paths)
        case TokenizedData():
            places["data.paths"] = " ".join(config.paths)
            places["data.validation_paths"] = " ".join(config.validation_paths)
        case HubData():
            places["data.name"] = config.name
    return places


def count_workers(config: DataConfig) -> int:
    """The number of worker processes: as configured, or one per core this process may use."""
    return config.processes or len(os.sched_getaffinity(0))


ALONE = "corpus"
"""What the source of a run without a mixture is called."""


def list_sources(config: DataConfig) -> list[SourceConfig]:
    """The sources of a mixture; a corpus by itself is one."""
    if isinstance(config, MixtureData):
        return config.sources
    return [SourceConfig(name=ALONE, folder=config.folder, weight=1.0)]


def read_alike(config: DataConfig, folder: str) -> DataConfig:
    """How another prepared corpus is read with the settings of `config`."""
    common = {each.name: getattr(config, each.name) for each in fields(DataConfig)}
    return DataConfig(**common | {"folder": folder})


class _InFolder(Protocol):
    folder: str


def find_folder(config: _InFolder) -> Path:
    """The folder of a corpus or source, `~` expanded; of a remote one, that of its copies."""
    if is_remote(config.folder):
        return mirror_folder(config.folder)
    return Path(config.folder).expanduser()
