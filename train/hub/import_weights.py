"""A published Hugging Face folder as step 0 of a run, read and written tensor by tensor.

The run starts with the folder's weights and with moments of zero, as after a resume: any layout
continues it.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor

from data.progress import open_progress
from data.tokenizer import load_tokenizer
from model.config import ModelConfig
from model.transformer import Transformer
from train.checkpoint import PARTIAL, Checkpoints
from train.config import CONFIG_FILE, RunConfig
from train.hub.config import FILE, HubConfig, from_hub_config, read_hub_config
from train.hub.folder import HubFolder
from train.hub.names import MODEL, Family, HubTensor, hub_tensors
from train.manifest import Manifest, Part, Piece, StoredTensor, merge_runs, write_manifest
from train.progress import Progress
from train.tensor_file import BLOCK_BYTES, sync_folder
from train.tensor_stream import TensorSpec, cut_shards, write_stream

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
SHARD_BYTES = 8_000_000_000


class Imported(NamedTuple):
    step_folder: Path
    num_tensors: int  # of the published folder
    parameters: int


class _Run(NamedTuple):
    """A run of a logical tensor's elements in the checkpoint; `source` None: zeros."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    source: HubTensor | None

    @property
    def key(self) -> str:
        return f"{self.name}@{self.start}"


def describe_model(published: Path) -> ModelConfig:
    """The model in a published folder.

    Raises:
        ValueError: It is no such folder, or a model that can't be built here; names the key.
    """
    values = read_hub_config(published)
    depth = values.get("num_nextn_predict_layers") or 0
    if depth and not _has_mtp(published, values):
        log.warning(
            "%s announces num_nextn_predict_layers=%d in %s, but the folder holds no MTP "
            "(transformers drops it when it saves); the model is imported without",
            published,
            depth,
            FILE,
        )
        depth = 0
    return from_hub_config(values, mtp_depth=depth)


def import_weights(published: Path, config: RunConfig) -> Imported:
    """Write the checkpoint of step 0. Host memory holds one tensor at a time.

    Raises:
        ValueError: A tensor is missing, surplus or misshapen, MTP's embedding or head is not the
            model's, the tokenizer is larger than the vocabulary, or the run has been started.
    """
    run_dir = Path(config.run_dir)
    checkpoints = Checkpoints(run_dir, keep=1)
    if checkpoints.steps() or (run_dir / CONFIG_FILE).exists():
        raise ValueError(f"run_dir={run_dir} holds a run already; choose another run_dir")
    assert config.data.tokenizer.path is not None, "the caller has chosen one"
    tokenizer = load_tokenizer(Path(config.data.tokenizer.path).expanduser())
    if tokenizer.size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer in {config.data.tokenizer.path} has {tokenizer.size} entries, the "
            f"model in {published} {config.model.vocab_size}; give the model's own tokenizer"
        )
    folder = HubFolder(published)
    values = read_hub_config(published)
    tensors = hub_tensors(config.model, Family(values["model_type"]))
    if values.get("tie_word_embeddings", False) and not config.model.tie_embedding:
        tensors = _untie(tensors)
    folder.check_coverage(tensors)
    _check_copies(folder, tensors)

    partial = checkpoints.path(0).with_name(checkpoints.path(0).name + PARTIAL)
    partial.mkdir(parents=True, exist_ok=True)
    parts = _write_parts(partial, folder, list(_plan(tensors, config.model)))
    manifest = Manifest(
        step=0,
        progress=asdict(Progress()),
        tokenizer=tokenizer.fingerprint,
        layout={"ranks": 1, "expert": 1},
        versions={name: version(name) for name in ("thrifty", "torch")},
        config=_plain_values(config),
        tensors=merge_runs(parts),
        files={part.file: part.stored for part in parts},
    )
    write_manifest(partial, manifest)
    sync_folder(partial)
    partial.rename(checkpoints.path(0))
    sync_folder(checkpoints.folder)
    sizes = [torch.Size(t.shape).numel() for t in tensors if not (t.is_copy or t.is_bias)]
    return Imported(checkpoints.path(0), len({t.name for t in tensors}), sum(sizes))


def _untie(tensors: list[HubTensor]) -> list[HubTensor]:
    """The tensors of a folder without a head for a model with one: it starts as the embedding."""
    head, embedding = (f"{MODEL[module]}.weight" for module in ("head", "embed"))
    return [t._replace(name=embedding) if t.name == head else t for t in tensors]


def _has_mtp(published: Path, values: HubConfig) -> bool:
    first = f"model.layers.{values['num_hidden_layers']}."
    return any(name.startswith(first) for name in HubFolder(published).specs)


def _check_copies(folder: HubFolder, tensors: list[HubTensor]) -> None:
    """MTP shares embedding and head here, so the folder's copies must be equal."""
    originals = {tensor.source: tensor.name for tensor in tensors if not tensor.is_copy}
    for tensor in tensors:
        if not tensor.is_copy:
            continue
        original, size = originals[tensor.source], torch.Size(tensor.shape).numel()
        for start in range(0, size, BLOCK_BYTES):
            count = min(BLOCK_BYTES, size - start)
            one, other = (
                folder.read_part(name, start=start, count=count) for name in (original, tensor.name)
            )
            if not torch.equal(one, other):
                raise ValueError(
                    f"{folder.path}: {tensor.name} differs from {original}, but MTP has no "
                    "embedding or head of its own here"
                )


def _plan(tensors: list[HubTensor], model: ModelConfig) -> Iterator[_Run]:
    """All runs of the checkpoint: each tensor with its moments, then the biases of V2's routers,
    which its folders lack."""
    with torch.device("meta"):
        empty = Transformer(model)
    shapes = {f"weight/{name}": tuple(p.shape) for name, p in empty.named_parameters()}
    shapes |= {f"buffer/{name}": tuple(b.shape) for name, b in empty.named_buffers()}
    sources = set()
    for tensor in tensors:
        if tensor.is_copy:
            continue
        source, numel = tensor.source, torch.Size(tensor.shape).numel()
        sources.add(source)
        yield _Run(source, shapes[source], tensor.start, numel, tensor)
        if not tensor.is_bias:
            for moment in MOMENTS:
                name = source.replace("weight/", f"{moment}/")
                yield _Run(name, shapes[source], tensor.start, numel, None)
    for name in shapes.keys() - sources:
        assert name.startswith("buffer/"), f"{name} is in no table"
        yield _Run(name, shapes[name], 0, torch.Size(shapes[name]).numel(), None)


def _write_parts(partial: Path, folder: HubFolder, runs: list[_Run]) -> list[Part]:
    by_key = {run.key: run for run in runs}
    specs = [TensorSpec(run.key, torch.float32, (run.numel,)) for run in runs]
    parts = []
    total_bytes = sum(spec.num_bytes for spec in specs)
    with open_progress().stage("import", total_bytes=total_bytes) as advance:
        for number, shard in enumerate(cut_shards(specs, shard_bytes=SHARD_BYTES)):
            file = f"part-{number:05}.safetensors"
            values = (_read(by_key[spec.name], folder) for spec in shard)
            stored = write_stream(partial / file, shard, values, advance=advance)
            entries = [
                (run.name, StoredTensor(run.shape, "float32", [Piece(file, run.start, run.numel)]))
                for run in (by_key[spec.name] for spec in shard)
            ]
            parts.append(Part(file, stored, entries))
    return parts


def _read(run: _Run, folder: HubFolder) -> Tensor:
    if run.source is None:
        return torch.zeros(1).expand(run.numel)
    return folder.read_values(run.source.name).flatten()


def _plain_values(config: RunConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
