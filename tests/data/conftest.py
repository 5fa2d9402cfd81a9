"""A corpus small enough to prepare in a second: pieces of a few standard library modules."""

import inspect
import json
import string
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from data.config import FilesData
from data.prepare import Prepared, prepare
from data.tokenizer import TokenizerConfig

ConfigMaker = Callable[..., FilesData]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """About 100 documents of 100 to 700 characters."""
    source = inspect.getsource(textwrap) + inspect.getsource(string)
    documents: list[str] = []
    while source:
        length = 100 + 37 * len(documents) % 600
        documents.append(source[:length])
        source = source[length:]
    return documents


@pytest.fixture(scope="session")
def corpus_file(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents as JSON lines."""
    path = tmp_path_factory.mktemp("source") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture(scope="session")
def make_config(corpus_file: Path) -> ConfigMaker:
    """Builds the small corpus' config for a folder, fields replaced at will."""

    def make(folder: Path, **fields: object) -> FilesData:
        values: dict[str, object] = {
            "paths": [str(corpus_file)],
            "tokenizer": TokenizerConfig(vocab_size=400),
            "validation_fraction": 0.2,
            "shard_bytes": 6000,
            "processes": 1,
        }
        return FilesData(folder=str(folder), **(values | fields))  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def prepared(make_config: ConfigMaker, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The small corpus, prepared; not to be changed."""
    return prepare(make_config(tmp_path_factory.mktemp("corpus")))
