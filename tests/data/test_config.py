"""Settings that cannot work are refused with key, value, rule and way out."""

from pathlib import Path

import pytest
import yaml

from data.config import DATA_KINDS, DataConfig, FilesData, HubData, StdlibData, check_data
from data.tokenizer import TokenizerConfig


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (
            StdlibData(folder="f", validation_fraction=1.5),
            r"data\.validation_fraction=1\.5 must lie in \(0, 1\); choose e\.g\. 0\.02",
        ),
        (StdlibData(folder=""), r"data\.folder is empty; name the folder"),
        (StdlibData(folder="f", kind="hub"), r"data\.kind=hub does not belong to StdlibData"),
        (StdlibData(folder="f", shard_bytes=0), r"data\.shard_bytes=0 must be positive"),
        (StdlibData(folder="f", processes=0), r"data\.processes=0 must be positive"),
        (FilesData(folder="f", paths=[]), r"data\.paths is empty; give glob patterns"),
        (HubData(folder="f", name=""), r"data\.name is empty"),
        (
            StdlibData(folder="f", tokenizer=TokenizerConfig(vocab_size=300)),
            r"data\.tokenizer\.vocab_size=300 must be at least 320",
        ),
        (
            StdlibData(folder="f", tokenizer=TokenizerConfig(train_bytes=0)),
            r"data\.tokenizer\.train_bytes=0 must be positive",
        ),
    ],
)
def test_impossible_settings_are_refused(config: DataConfig, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_data(config)


def test_the_defaults_pass() -> None:
    check_data(StdlibData(folder="f"))
    check_data(FilesData(folder="f", paths=["*.txt"]))
    check_data(HubData(folder="f", name="someone/something"))


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_the_yaml_of_a_kind_sets_fields_that_exist(kind: str) -> None:
    path = Path(__file__).parents[2] / "configs" / "data" / f"{kind}.yaml"
    values = yaml.safe_load(path.read_text())
    assert values.pop("defaults") == [f"{kind}_schema", "_self_"]
    assert values["kind"] == kind
    fields = DATA_KINDS[kind].__dataclass_fields__
    assert values.keys() <= fields.keys()
    assert values.pop("tokenizer", {}).keys() <= TokenizerConfig.__dataclass_fields__.keys()
