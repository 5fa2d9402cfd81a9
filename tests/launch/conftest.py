import email
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a run of the tiny model that is over in a moment, on one package's source."""
    assert email.__file__ is not None
    return [
        "experiment=smoke",
        "data=files",
        f"data.paths=[{Path(email.__file__).parent}/*.py]",
        f"data.folder={tmp_path_factory.mktemp('corpus')}",
        "data.tokenizer.vocab_size=384",
        "data.processes=1",
        "data.validation_fraction=0.2",
    ]
