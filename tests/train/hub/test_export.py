"""Exports of every architecture pass the gate, and whatever is done to them afterwards fails it."""

import json
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_layers import MtpModel

import train.hub.gate
from data.tokenizer import load_tokenizer
from model.config import MTPConfig
from model.rope import rotation
from tests.ranks import run_ranks
from tests.train.hub.families import FAMILIES, GROUPED, moe
from tests.train.random_run import random_run
from tests.train.tiny import tiny_model, tiny_run
from train.checkpoint.restore import restore
from train.checkpoint.stored_tensors import open_checkpoint
from train.config import CONFIG_FILE, RunConfig, write_config
from train.engine.engine import join
from train.hub.config import family_of
from train.hub.dtype import HubDtype
from train.hub.export import ExportConfig, export
from train.hub.folder import HubFolder
from train.hub.gate import (
    GateError,
    GateReport,
    check_folder,
    compare_logits,
    our_logits,
    real_tokens,
    their_logits,
)
from train.hub.names import hub_tensors
from train.hub.tokenizer import find_tokenizer
from train.layout.parallel import ParallelConfig
from train.loop import train as train_run
from train.ranks import alone

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
EXPERTS = tuple(f"model.layers.2.mlp.experts.{e}.up_proj.weight" for e in (0, 5))
MATRIX = "model.layers.0.self_attn.kv_b_proj.weight"
Change = Callable[[dict[str, Tensor]], None]


class Case(NamedTuple):
    """A V3-style run and its export in fp32."""

    run: RunConfig
    out: Path

    def check(self, out: Path) -> GateReport:
        """The gate on a folder that claims to be the run's export."""
        model = self.run.model
        return check_folder(
            out,
            hub_tensors(model, family_of(model)),
            open_checkpoint(Path(self.run.run_dir), step=None),
            model=model,
            tokens=real_tokens(self.run.data),
            tokenizer=load_tokenizer(find_tokenizer(self.run.data)),
            dtype=HubDtype.fp32,
            tolerance=1e-5,
        )

    def compare_logits(self, out: Path) -> float:
        """The gate's second half alone."""
        model, tokens = self.run.model, real_tokens(self.run.data)
        tensors = hub_tensors(model, family_of(model))
        stored = open_checkpoint(Path(self.run.run_dir), step=None)
        ours = our_logits(model, tensors, stored, tokens, dtype=HubDtype.fp32)
        theirs = their_logits(HubFolder(out), tensors, tokens, dtype=HubDtype.fp32)
        return compare_logits(ours, theirs, out=out, tolerance=1e-5)


@pytest.fixture(scope="module")
def case(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("export")
    run = random_run(folder, corpus, model=FAMILIES["v3"])
    export(ExportConfig(run_dir=run.run_dir, out=str(folder / "hub"), dtype=HubDtype.fp32))
    return Case(run, folder / "hub")


@pytest.fixture
def tampered(case: Case, tmp_path: Path) -> Callable[[Change], Path]:
    """A copy of the export with other tensors."""

    def make(change: Change) -> Path:
        out = tmp_path / "tampered"
        shutil.copytree(case.out, out)
        tensors = load_file(out / "model.safetensors")
        change(tensors)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return out

    return make


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, HubDtype.fp32) for name in FAMILIES]
    + [(name, dtype) for name in ("v3", "v2", "qwen2") for dtype in (HubDtype.bf16, HubDtype.fp8)],
)
def test_transformers_computes_the_same_from_the_folder(
    name: str, dtype: HubDtype, corpus: Path, tmp_path: Path
) -> None:
    run = random_run(tmp_path, corpus, model=FAMILIES[name])
    config = ExportConfig(
        run_dir=run.run_dir, out=str(tmp_path / "hub"), dtype=dtype, shard_bytes=30_000
    )
    exported = export(config)
    assert exported.step == 7
    assert exported.gate.skipped == ""
    assert exported.gate.difference is not None
    assert exported.gate.difference <= 1e-5
    is_forced = name.startswith("qwen2")  # upon Qwen's own tokenizer
    assert ("PreTrainedTokenizerFast" in exported.tokenizer_note) == is_forced
    load = transformers.AutoModelForCausalLM.from_pretrained
    if dtype is not HubDtype.fp8:  # which transformers runs on GPUs only
        _, info = load(tmp_path / "hub", trust_remote_code=False, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
    index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == exported.num_files > 1
    assert index["metadata"]["total_size"] == exported.num_bytes


def test_any_layout_s_checkpoint_is_exported(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layouts: dict[int, dict[str, int]] = {
        1: {"micro_batch_size": 8},
        2: {"micro_batch_size": 4, "expert": 2, "zero_stage": 2},
    }
    exported: list[dict[str, Tensor]] = []
    for num_ranks, layout in layouts.items():
        folder = tmp_path / str(num_ranks)
        config = tiny_run(folder, parallel=ParallelConfig(**layout))
        config.data.folder = str(corpus)
        config.schedule.steps = 1
        config.schedule.peak_lr = 1e-6  # the first step of AdamW is blind to the size of gradients
        config.evaluation.max_sequences = 4
        Path(config.run_dir).mkdir(parents=True)
        write_config(config, Path(config.run_dir) / CONFIG_FILE)
        run_ranks(num_ranks, partial(train_on_rank, config))
        capfd.readouterr()
        out = folder / "hub"
        gate = export(ExportConfig(run_dir=config.run_dir, out=str(out), dtype=HubDtype.fp32)).gate
        assert gate.difference is not None
        shown = capfd.readouterr().err
        assert re.search(r"export: \d+\.\d MB in", shown), "progress"
        exported.append(load_file(out / "model.safetensors"))
    whole, spread = exported
    assert spread.keys() == whole.keys()
    for name, tensor in spread.items():
        assert (tensor - whole[name]).abs().max() <= 1e-4 * whole[name].abs().max(), name


def train_on_rank(config: RunConfig) -> None:
    train_run(config, join(config.parallel, timeout_minutes=5))


@torch.no_grad()
def test_the_folder_loads_without_a_warning_and_its_mtp_is_ours(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # transformers looks for MTP where V3 has it, after 61 layers.
    model = tiny_model(num_layers=61, dim=16, ffn_dim=16, moe=moe(GROUPED))
    run = random_run(tmp_path, corpus, model=model)
    out = tmp_path / "hub"
    export(ExportConfig(run_dir=run.run_dir, out=str(out), dtype=HubDtype.fp32))
    transformers.utils.logging.enable_propagation()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    transformers.utils.logging.disable_propagation()
    assert caplog.messages == []

    tokens = real_tokens(run.data)
    positions = torch.arange(tokens.shape[1])[None]
    hidden = torch.randn(*tokens.shape, model.dim)
    their_mtp = MtpModel.from_pretrained(theirs)
    wanted = their_mtp.forward_layer(0, hidden, positions, None, input_ids=tokens)
    ours = restore(Path(run.run_dir), ranks=alone()).model
    got = ours.mtp[0](
        hidden,
        ours.embed(tokens),
        rotation(model.rope, positions.expand_as(tokens), dim=model.attention.rotated_dim),
        torch.ones_like(tokens, dtype=torch.bool),
        segments=[tokens.shape[1]] * len(tokens),
    ).hidden
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_an_export_in_bf16_keeps_the_bias_in_fp32(case: Case, tmp_path: Path) -> None:
    export(ExportConfig(run_dir=case.run.run_dir, out=str(tmp_path / "hub"), gate=False))
    tensors, exact = (load_file(out / "model.safetensors") for out in (tmp_path / "hub", case.out))
    assert torch.equal(tensors[BIAS], exact[BIAS])
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if "bias" in name else torch.bfloat16), name
        assert torch.equal(tensor, exact[name].to(tensor.dtype))


def test_mtp_is_left_out_when_asked(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "hub"
    exported = export(ExportConfig(run_dir=case.run.run_dir, out=str(out), mtp=False))
    assert exported.gate.difference is not None
    assert not any("layers.3." in name for name in load_file(out / "model.safetensors"))
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0


def drop_bias(tensors: dict[str, Tensor]) -> None:
    del tensors[BIAS]


def round_bias(tensors: dict[str, Tensor]) -> None:
    tensors[BIAS] = tensors[BIAS].bfloat16()


def swap_experts(tensors: dict[str, Tensor]) -> None:
    first, second = (tensors[name] for name in EXPERTS)
    tensors |= dict(zip(EXPERTS, (second, first), strict=True))


def perturb(tensors: dict[str, Tensor]) -> None:
    tensors[MATRIX][3, 2] += 0.01


def transpose(tensors: dict[str, Tensor]) -> None:
    tensors[MATRIX] = tensors[MATRIX].t().contiguous()


def delete_mtp(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".layers.3." in name]:
        del tensors[name]


def swap_mtp_norms(tensors: dict[str, Tensor]) -> None:
    enorm, hnorm = "model.layers.3.enorm.weight", "model.layers.3.hnorm.weight"
    tensors[enorm], tensors[hnorm] = tensors[hnorm], tensors[enorm]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.extra"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_bias, rf"{BIAS} is missing"),
        (round_bias, rf"found .*{BIAS}.*bfloat16.* expected .*float32"),
        (swap_experts, rf"{EXPERTS[0]} differs from .*weight/layers.2.ffn.experts.up in 512 of"),
        (perturb, rf"{MATRIX} differs .* in 1 of 512 elements, by 0.01 at most"),
        (transpose, rf"found .*{MATRIX}.* expected"),
        (delete_mtp, r"model.layers.3.*is missing"),
        (swap_mtp_norms, r"model.layers.3.enorm.weight differs"),
        (add, r"model.layers.0.extra is one too many"),
    ],
)
def test_the_gate_names_the_tensor_that_is_not_the_checkpoint_s(
    change: Change, message: str, case: Case, tampered: Callable[[Change], Path]
) -> None:
    out = tampered(change)
    before = sorted(out.iterdir())
    with pytest.raises(GateError, match=message):
        case.check(out)
    assert sorted(out.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_bias, rf"transformers reports missing_keys: {BIAS}"),
        (swap_experts, r"transformers' logits differ from ours by .*; most at sequence \d"),
        (perturb, r"transformers' logits differ from ours"),
        (add, r"transformers reports unexpected_keys: model.layers.0.extra"),
    ],
)
def test_logits_alone_reveal_what_transformers_computes_with(
    change: Change, message: str, case: Case, tampered: Callable[[Change], Path]
) -> None:
    with pytest.raises(GateError, match=message):
        case.compare_logits(tampered(change))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("routed_scaling_factor", 2.4),
        ("topk_group", 1),
        ("norm_topk_prob", False),
        ("rope_scaling", None),
    ],
)
def test_a_setting_that_is_wrong_in_config_json_fails_the_gate(
    key: str, value: Any, case: Case, tampered: Callable[[Change], Path]
) -> None:
    out = tampered(lambda tensors: None)
    config = json.loads((out / "config.json").read_text()) | {key: value}
    config["rope_parameters"] |= {"factor": 4.0 if key != "rope_scaling" else 8.0}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(GateError, match="logits differ"):
        case.check(out)


def test_a_tokenizer_that_cuts_otherwise_fails_the_gate(
    case: Case, tampered: Callable[[Change], Path]
) -> None:
    out = tampered(lambda tensors: None)
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(GateError, match=r"the tokenizer encodes a text otherwise from token \d+"):
        case.check(out)


def test_without_memory_or_transformers_the_gate_says_what_it_left_out(
    case: Case, tampered: Callable[[Change], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train.hub.gate, "MEMORY_FACTOR", 1e12)
        report = case.check(case.out)
        assert report.difference is None
        assert "GB of host memory in fp32" in report.skipped
        with pytest.raises(GateError, match="is missing"):
            case.check(tampered(drop_bias))
    monkeypatch.setattr(train.hub.gate, "find_spec", lambda name: None)
    assert "transformers is not installed" in case.check(case.out).skipped


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_dir": "/nowhere"}, r"no config of a run"),
        ({"step": 5}, r"step=5 has no checkpoint .* choose one of \[7\]"),
        ({"shard_bytes": 0}, r"shard_bytes=0 must be positive"),
        ({"tolerance": 0.0}, r"tolerance=0.0 must be positive"),
        ({"out": "."}, r"out=. is not empty; choose another folder"),
    ],
)
def test_impossible_exports_are_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, case: Case, tmp_path: Path
) -> None:
    values = {"run_dir": case.run.run_dir, "out": str(tmp_path / "hub")} | changes
    with pytest.raises(ValueError, match=message):
        export(ExportConfig(**values))
    assert not (tmp_path / "hub").exists()


def test_a_run_whose_corpus_is_not_there_is_refused_before_anything_is_written(
    case: Case, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(case.run.run_dir, run_dir)
    run = deepcopy(case.run)
    run.data.folder = str(tmp_path / "elsewhere")
    config = ExportConfig(run_dir=str(run_dir), out=str(tmp_path / "hub"))
    for tokenizer, message in (
        (None, "there is no tokenizer at .*; prepare the run's corpus first"),
        (str(corpus / "tokenizer.model"), "data.folder=.* holds no finished corpus"),
    ):
        run.data.tokenizer.path = tokenizer
        write_config(run, run_dir / CONFIG_FILE)
        with pytest.raises(ValueError, match=message):
            export(config)
    assert not (tmp_path / "hub").exists()


def test_a_model_without_a_hub_architecture_is_refused_before_anything_is_written(
    corpus: Path, tmp_path: Path
) -> None:
    run = random_run(tmp_path, corpus, model=tiny_model(norm_eps=1e-5, mtp=MTPConfig(depth=0)))
    with pytest.raises(ValueError, match=r"this model can't be exported: model.norm_eps=1e-05"):
        export(ExportConfig(run_dir=run.run_dir, out=str(tmp_path / "hub")))
    assert not (tmp_path / "hub").exists()
