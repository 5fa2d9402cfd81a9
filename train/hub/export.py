"""A run's model as a Hugging Face folder, written tensor by tensor and then checked.

OUT/model-00001-of-00004.safetensors   weights; one model.safetensors where they fit into it
OUT/model.safetensors.index.json       which tensor lies in which file
OUT/config.json  generation_config.json  tokenizer.json  tokenizer_config.json
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from data.atomic_file import read_json, write_json
from data.progress import open_progress
from data.tokenizer import Tokenizer, load_tokenizer
from model.rope import RopeScaling
from train.checkpoint.stored_tensors import StoredTensors, open_checkpoint
from train.checkpoint.tensor_stream import cut_shards, write_stream
from train.config import CONFIG_FILE, RunConfig, read_config
from train.ema import Weights
from train.hub import published
from train.hub.config import FILE, FP8_METHOD, family_of, to_hub_config, without_mtp
from train.hub.dtype import HubDtype, encode, stored_specs
from train.hub.folder import INDEX, SINGLE
from train.hub.gate import GateReport, check_folder, real_tokens
from train.hub.names import HubTensor, hub_tensors
from train.hub.tokenizer import export_tokenizer, find_tokenizer


@dataclass(slots=True, kw_only=True)
class ExportConfig:
    #: Folder of the run whose model is exported.
    run_dir: str
    #: Step of the checkpoint; null takes the newest.
    step: int | None = None
    #: Its weights as trained, or their moving average (ema).
    weights: Weights = Weights.trained
    #: Folder to write; it must be empty or not exist.
    out: str
    #: Number format of the weights: fp32 is exact, bf16 and fp8 are what DeepSeek publishes.
    dtype: HubDtype = HubDtype.bf16
    #: Whether MTP's modules are exported with the model.
    mtp: bool = True
    #: Bytes of one weights file at most.
    shard_bytes: int = 5_000_000_000
    #: Whether the folder is read back, and loaded by transformers, before the command succeeds.
    gate: bool = True
    #: Largest difference of transformers' logits from ours, relative to the largest logit.
    tolerance: float = 1e-5


class Exported(NamedTuple):
    step: int
    num_files: int
    num_bytes: int  # of weights
    tokenizer_note: str  # what the tokenizer's files are not good for; empty where nothing
    gate: GateReport


def export(config: ExportConfig) -> Exported:
    """Write the folder and check it. Host memory holds one tensor at a time until the gate.

    Raises:
        ValueError: Run, checkpoint, corpus or its tokenizer is not there, no hub architecture
            computes the same, or the folder is not empty. Nothing has been written.
        GateError: The folder is not what the run's model is; it stays as it is.
    """
    run = read_config(Path(config.run_dir) / CONFIG_FILE, RunConfig)
    out = Path(config.out).expanduser()
    check_export(config, out)
    model = run.model if config.mtp else without_mtp(run.model)
    tensors = hub_tensors(model, family_of(model))
    tokenizer = load_tokenizer(find_tokenizer(run.data))
    tokens = real_tokens(run.data) if config.gate else None
    stored = open_checkpoint(Path(config.run_dir), step=config.step, weights=config.weights)
    if stored.manifest.tokenizer != tokenizer.fingerprint:
        raise ValueError(
            f"the tokenizer in {find_tokenizer(run.data)} is not the one that the checkpoint of "
            f"step {stored.manifest.step} was trained with; prepare the run's corpus again"
        )

    out.mkdir(parents=True, exist_ok=True)
    num_bytes, num_files = _write_weights(
        out, tensors, stored, dtype=config.dtype, shard_bytes=config.shard_bytes
    )
    kept = Path(config.run_dir) / published.FOLDER
    max_seq_len = _max_seq_len(run, kept)
    note = export_tokenizer(run.data, out, max_seq_len=max_seq_len)
    write_json(out / published.GENERATION, _generation_config(tokenizer, kept))
    described = to_hub_config(model, max_seq_len=max_seq_len)
    write_json(out / FILE, described | _token_ids(tokenizer) | _number_format(config.dtype))

    report = GateReport(skipped="gate=false")
    if tokens is not None:
        report = check_folder(
            out,
            tensors,
            stored,
            model=model,
            tokens=tokens,
            tokenizer=None if note else tokenizer,
            dtype=config.dtype,
            tolerance=config.tolerance,
        )
    note = note or report.tokenizer_note
    return Exported(stored.manifest.step, num_files, num_bytes, note, report)


def check_export(config: ExportConfig, out: Path) -> None:
    """Refuse, with a ValueError, a folder that holds something, and numbers out of range."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out} is not empty; choose another folder, or delete this one")
    if config.shard_bytes < 1:
        raise ValueError(f"shard_bytes={config.shard_bytes} must be positive")
    if config.tolerance <= 0:
        raise ValueError(
            f"tolerance={config.tolerance} must be positive; gate=false checks nothing"
        )


def _write_weights(
    out: Path,
    tensors: list[HubTensor],
    stored: StoredTensors,
    *,
    dtype: HubDtype,
    shard_bytes: int,
) -> tuple[int, int]:
    """Bytes and files written."""
    specs = [spec for tensor in tensors for spec in stored_specs(tensor, dtype)]
    shards = cut_shards(specs, shard_bytes=shard_bytes)
    num_bytes = sum(spec.num_bytes for spec in specs)
    values = _encode_all(tensors, stored, dtype)
    places: dict[str, str] = {}
    with open_progress().stage("export", total_bytes=num_bytes) as advance:
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            name = SINGLE if len(shards) == 1 else name
            write_stream(out / name, shard, islice(values, len(shard)), advance=advance)
            places |= {spec.name: name for spec in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(places.items()))}
        write_json(out / INDEX, index)
    return num_bytes, len(shards)


def _encode_all(
    tensors: list[HubTensor], stored: StoredTensors, dtype: HubDtype
) -> Iterator[Tensor]:
    for tensor in tensors:
        # No name for the values: it would keep them while the next tensor is read.
        yield from encode(
            tensor, stored.read(tensor.source, start=tensor.start, shape=tensor.shape), dtype
        )


def _max_seq_len(run: RunConfig, kept: Path) -> int:
    """Positions that the model is good for: as published, as stretched, or as trained on."""
    lengths = [run.data.seq_len]
    if run.model.rope.scaling in (RopeScaling.yarn, RopeScaling.llama3):
        lengths.append(round(run.model.rope.original_seq_len * run.model.rope.factor))
    if (kept / FILE).is_file():
        lengths.append(int(read_json(kept / FILE)["max_position_embeddings"]))
    return max(lengths)


def _generation_config(tokenizer: Tokenizer, kept: Path) -> dict[str, Any]:
    path = kept / published.GENERATION
    return _token_ids(tokenizer) | (read_json(path) if path.is_file() else {})


def _token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def _number_format(dtype: HubDtype) -> dict[str, Any]:
    values: dict[str, Any] = {"torch_dtype": str(dtype.torch).removeprefix("torch.")}
    return values | ({"quantization_config": FP8_METHOD} if dtype is HubDtype.fp8 else {})
