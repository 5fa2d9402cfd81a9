"""A published Hugging Face folder as step 0 of a run, read and written tensor by tensor.

The run starts with the folder's weights and with moments of zero, as after a resume: any layout
continues it.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from data.tokenizer import load_tokenizer
from model.config import ModelConfig
from model.transformer import Transformer
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.stream_checkpoint import Run, write_checkpoint
from train.checkpoint.tensor_file import BLOCK_BYTES
from train.config import CONFIG_FILE, RunConfig, describe_config
from train.hub.config import FILE, HubConfig, from_hub_config, read_hub_config
from train.hub.folder import HubFolder
from train.hub.names import MODEL, Family, HubTensor, hub_tensors
from train.progress import Progress

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")


class Imported(NamedTuple):
    step_folder: Path
    num_tensors: int  # of the published folder
    parameters: int


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

    about = {
        "step": 0,
        "progress": asdict(Progress()),
        "tokenizer": tokenizer.fingerprint,
        "layout": {"ranks": 1, "expert": 1},
        "versions": {name: version(name) for name in ("thrifty", "torch")},
        "config": describe_config(config),
    }
    runs = list(_plan(folder, tensors, config.model))
    step_folder = write_checkpoint(run_dir, runs, about, stage="import")
    sizes = [torch.Size(t.shape).numel() for t in tensors if not (t.is_copy or t.is_bias)]
    return Imported(step_folder, len({t.name for t in tensors}), sum(sizes))


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


def _plan(folder: HubFolder, tensors: list[HubTensor], model: ModelConfig) -> Iterator[Run]:
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
        read = partial(folder.read_values, tensor.name)
        yield Run(source, shapes[source], tensor.start, numel, torch.float32, read)
        if not tensor.is_bias:
            for moment in MOMENTS:
                name = source.replace("weight/", f"{moment}/")
                yield _zeros(name, shapes[source], tensor.start, numel)
    for name in shapes.keys() - sources:
        assert name.startswith("buffer/"), f"{name} is in no table"
        yield _zeros(name, shapes[name], 0, torch.Size(shapes[name]).numel())


def _zeros(name: str, shape: tuple[int, ...], start: int, numel: int) -> Run:
    """So many zeros, which take no memory."""
    return Run(name, shape, start, numel, torch.float32, lambda: torch.zeros(1).expand(numel))
