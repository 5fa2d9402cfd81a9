"""Published folders become runs: bit by bit, and only when every tensor is accounted for."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.prepare import tokenizer_path
from data.tokenizer import TokenizerConfig
from model.config import MTPConfig
from model.fp8 import quantise_blocks as quantise
from tests.train.hub.families import FAMILIES
from tests.train.random_run import random_run
from tests.train.tiny import tiny_run
from train.checkpoint.coverage import check_coverage
from train.checkpoint.integrity import verify_files
from train.checkpoint.restore import restore
from train.checkpoint.stored_tensors import StoredTensors, open_checkpoint
from train.config import CONFIG_FILE, RunConfig, write_config
from train.hub.config import to_hub_config
from train.hub.dtype import SCALE, HubDtype
from train.hub.export import ExportConfig, export
from train.hub.fp8_blocks import dequantise
from train.hub.import_weights import describe_model, import_weights
from train.hub.published import keep_published
from train.ranks import alone

Change = Callable[[dict[str, Tensor]], object]


def importing(published: Path, folder: Path, corpus: Path) -> RunConfig:
    """The config under which a folder is imported."""
    config = tiny_run(folder, model=describe_model(published))
    config.data.folder = str(corpus)
    config.data.tokenizer = TokenizerConfig(path=str(tokenizer_path(config.data)))
    return config


def read_all(stored: StoredTensors) -> dict[str, Tensor]:
    return {
        name: stored.read(name, start=0, shape=tensor.shape)
        for name, tensor in stored.manifest.tensors.items()
    }


@pytest.fixture(scope="module")
def published(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a V3 with MTP."""
    folder = tmp_path_factory.mktemp("published")
    run = random_run(folder, corpus, model=FAMILIES["v3"])
    out = folder / "hub"
    export(ExportConfig(run_dir=run.run_dir, out=str(out), dtype=HubDtype.fp32, gate=False))
    return out


@pytest.fixture
def changed(published: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """A copy of the published folder with other tensors."""

    def make(change: Change) -> Path:
        out = tmp_path / "changed"
        out.mkdir()
        (out / "config.json").write_bytes((published / "config.json").read_bytes())
        tensors = load_file(published / "model.safetensors")
        change(tensors)
        save_file(tensors, out / "model.safetensors")
        return out

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_ours_to_the_hub_and_back_is_bit_equal(name: str, corpus: Path, tmp_path: Path) -> None:
    run = random_run(tmp_path / "before", corpus, model=FAMILIES[name])
    out = tmp_path / "hub"
    export(
        ExportConfig(
            run_dir=run.run_dir, out=str(out), dtype=HubDtype.fp32, shard_bytes=70_000, gate=False
        )
    )
    config = importing(out, tmp_path / "after", corpus)
    imported = import_weights(out, config)
    before = read_all(open_checkpoint(Path(run.run_dir), step=7))
    stored = open_checkpoint(Path(config.run_dir), step=0)
    after = read_all(stored)

    weights = {name: t for name, t in before.items() if name.startswith("weight/")}
    moments = {
        f"{moment}/{name.removeprefix('weight/')}": torch.zeros_like(tensor)
        for name, tensor in weights.items()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    assert after.keys() == before.keys() | moments.keys()
    for key, tensor in (before | moments).items():
        assert torch.equal(after[key], tensor), key
    check_coverage(stored.manifest, {key: tuple(tensor.shape) for key, tensor in after.items()})
    verify_files(imported.step_folder, stored.manifest)
    assert imported.parameters == sum(tensor.numel() for tensor in weights.values())


def test_a_tied_model_can_be_untied_at_import(corpus: Path, tmp_path: Path) -> None:
    run = random_run(tmp_path / "before", corpus, model=FAMILIES["qwen2"])
    out = tmp_path / "hub"
    export(ExportConfig(run_dir=run.run_dir, out=str(out), dtype=HubDtype.fp32, gate=False))
    config = importing(out, tmp_path / "after", corpus)
    assert config.model.tie_embedding
    config.model.tie_embedding = False  # as R1's smallest student is to its base
    imported = import_weights(out, config)
    before = read_all(open_checkpoint(Path(run.run_dir), step=7))
    after = read_all(open_checkpoint(Path(config.run_dir), step=0))
    assert torch.equal(after["weight/head.weight"], before["weight/embed.weight"])
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert imported.parameters == sum(
        tensor.numel() for name, tensor in after.items() if name.startswith("weight/")
    )


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_model_that_transformers_made_computes_the_same_here(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    model = replace(FAMILIES[name], mtp=MTPConfig(depth=0), init_std=0.2)
    (tmp_path / "config.json").write_text(json.dumps(to_hub_config(model, max_seq_len=64)))
    settings = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_config(settings).eval()
    for key, tensor in theirs.state_dict().items():
        if "norm" in key or "bias" in key:
            tensor.add_(torch.randn_like(tensor) * 0.2)
    published = tmp_path / "published"
    theirs.save_pretrained(published)

    config = importing(published, tmp_path, corpus)
    import_weights(published, config)
    write_config(config, Path(config.run_dir) / CONFIG_FILE)
    ours = restore(Path(config.run_dir), ranks=alone()).model
    tokens = torch.randint(model.vocab_size, (2, 30))
    wanted = theirs(tokens).logits
    assert (ours.logits(tokens) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_fp8_blocks_are_read_as_published(
    changed: Callable[[Change], Path], corpus: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    kept: list[Tensor] = []

    def to_fp8(tensors: dict[str, Tensor]) -> None:
        tensors[name], tensors[name + SCALE] = kept[:] = quantise(tensors[name])
        tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
        copy = "model.layers.3.shared_head.head.weight"
        tensors[copy] = tensors[copy].bfloat16()

    out = changed(to_fp8)
    config = importing(out, tmp_path, corpus)
    import_weights(out, config)
    stored = open_checkpoint(Path(config.run_dir), step=0)
    got = stored.read("weight/layers.1.ffn.experts.down", start=0, shape=(8, 32, 16))
    assert torch.equal(got[3], dequantise(*kept))


def lose(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def bend(name: str) -> Change:
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


def put(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
EXPERT = "model.layers.2.mlp.experts.7.up_proj.weight"
MTP = "model.layers.3."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose(BIAS), rf"{BIAS} is missing, which its config.json asks for"),
        (lose(EXPERT), rf"{EXPERT} is missing"),
        (lose(f"{MTP}eh_proj.weight"), rf"{MTP}eh_proj.weight is missing"),
        (bend(EXPERT), rf"{EXPERT} has shape \[15, 32\], but its config.json asks for \[16, 32\]"),
        (
            put("model.layers.0.mlp.gate.weight", torch.ones(8, 32)),
            r"model.layers.0.mlp.gate.weight is one too many for its config.json",
        ),
        (
            put(EXPERT, torch.ones(16, 32).to(torch.float8_e4m3fn)),
            rf"{EXPERT}{SCALE} is missing",
        ),
        (put(EXPERT + SCALE, torch.ones(1, 1)), rf"{EXPERT}{SCALE} is one too many"),
        (
            put(f"{MTP}embed_tokens.weight", torch.ones(512, 32)),
            rf"{MTP}embed_tokens.weight differs from model.embed_tokens.weight",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_before_anything_is_written(
    change: Change, message: str, changed: Callable[[Change], Path], corpus: Path, tmp_path: Path
) -> None:
    out = changed(change)
    config = importing(out, tmp_path, corpus)
    with pytest.raises(ValueError, match=message):
        import_weights(out, config)
    assert not Path(config.run_dir).exists()


def test_mtp_that_config_json_announces_and_the_folder_lacks_is_reported(
    changed: Callable[[Change], Path], caplog: pytest.LogCaptureFixture
) -> None:
    def lose_mtp(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(MTP)]:
            del tensors[name]

    with caplog.at_level(logging.WARNING):
        model = describe_model(changed(lose_mtp))
    assert model.mtp.depth == 0
    assert "announces num_nextn_predict_layers=1" in caplog.text


def test_buffers_of_old_folders_that_follow_from_the_config_are_ignored(
    changed: Callable[[Change], Path], corpus: Path, tmp_path: Path
) -> None:
    out = changed(put("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(2)))
    import_weights(out, importing(out, tmp_path, corpus))


def test_a_folder_of_pickles_is_refused(published: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((published / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"must be converted to safetensors first"):
        describe_model(tmp_path)


def test_a_run_is_never_overwritten(published: Path, corpus: Path, tmp_path: Path) -> None:
    config = importing(published, tmp_path, corpus)
    import_weights(published, config)
    with pytest.raises(ValueError, match=rf"run_dir={re.escape(config.run_dir)} holds a run"):
        import_weights(published, config)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(
    published: Path, corpus: Path, tmp_path: Path
) -> None:
    config = importing(published, tmp_path, corpus)
    config.model.vocab_size = 100
    with pytest.raises(ValueError, match=r"has 512 entries, the model in .* 100"):
        import_weights(published, config)


def test_what_training_does_not_change_comes_back_at_export(
    published: Path, corpus: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in published.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config_json = json.loads((source / "config.json").read_text())
    config_json["max_position_embeddings"] = 12345
    (source / "config.json").write_text(json.dumps(config_json))
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    config = importing(source, tmp_path, corpus)
    import_weights(source, config)
    run_dir = Path(config.run_dir)
    keep_published(source, run_dir)
    write_config(config, run_dir / CONFIG_FILE)
    out = tmp_path / "out"
    exported = export(ExportConfig(run_dir=str(run_dir), out=str(out), dtype=HubDtype.fp32))
    assert exported.gate.difference is not None
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["temperature"] == 0.6
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 12345
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
