from pathlib import Path

# What deepspeed.initialize imports late (with all of torch's compiler), once, before ranks fork.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import pytest

from data.prepare import prepare
from tests.train.tiny import tiny_run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny prepared corpus."""
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny_run(folder)
    prepare(config.data)
    return Path(config.data.folder)
