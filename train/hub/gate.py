"""The gate at the end of an export: is the folder the model?

First every tensor of the folder is compared with the checkpoint, streaming: biases and MTP, which
transformers drops or never computes, are caught here. Then transformers loads the folder, without
any code of ours, and its logits on real text must be ours. Both sides compute in fp32 from the
weights as they were rounded, so that one tolerance holds for every number format.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from data.config import DataConfig, Verify
from data.progress import Advance, open_progress
from data.samples import open_samples
from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.transformer import Transformer
from train.checkpoint.restore import weight_fragments
from train.checkpoint.stored_tensors import StoredTensors
from train.hub.dtype import HubDtype, decode, encode, stored_specs
from train.hub.folder import HubFolder
from train.hub.names import HubTensor

log = logging.getLogger(__name__)

NUM_SEQUENCES, MAX_TOKENS = 2, 256  # of real text
# Of a model in fp32: itself, and a good part of it twice while transformers stacks experts.
MEMORY_FACTOR = 2


class GateError(Exception):
    """The folder is not what the model is; says which tensor, logit or text differs."""


class GateReport(NamedTuple):
    """What was found equal."""

    num_tensors: int = 0
    difference: float | None = None  # of logits, relative to the largest; None: not compared
    skipped: str = ""  # why not
    tokenizer_note: str = ""  # what to know before loading the tokenizer


def check_folder(
    out: Path,
    tensors: Sequence[HubTensor],
    stored: StoredTensors,
    *,
    model: ModelConfig,
    tokens: Int64[Tensor, "B S"],
    tokenizer: Tokenizer | None,
    dtype: HubDtype,
    tolerance: float,
) -> GateReport:
    """Compare the folder with the checkpoint, and transformers' logits on `tokens` with ours.

    Without a `tokenizer` the folder's is not compared.

    Raises:
        GateError: Something differs.
    """
    try:
        folder = HubFolder(out)
    except ValueError as error:
        raise GateError(str(error)) from error
    compare_files(folder, tensors, stored, dtype=dtype)
    reason = _reason_to_skip(tensors)
    if reason:
        log.warning("the gate compared the files only, not the logits: %s", reason)
        return GateReport(len(tensors), None, reason)
    note = ""
    if tokenizer is not None:
        note = compare_tokenizers(out, tokenizer, tokens)
    ours = our_logits(model, tensors, stored, tokens, dtype=dtype)
    theirs = their_logits(folder, tensors, tokens, dtype=dtype)
    difference = compare_logits(ours, theirs, out=out, tolerance=tolerance)
    return GateReport(len(tensors), difference, tokenizer_note=note)


def compare_files(
    folder: HubFolder,
    tensors: Sequence[HubTensor],
    stored: StoredTensors,
    *,
    dtype: HubDtype,
) -> None:
    """Every tensor in the files must be, bit by bit, the checkpoint's in the folder's format.

    Raises:
        GateError: One is missing, surplus, of another shape or type, or has other values.
    """
    wanted = {spec.name: spec for tensor in tensors for spec in stored_specs(tensor, dtype)}
    for name in sorted(wanted.keys() | folder.specs.keys()):
        if name not in folder.specs:
            raise GateError(f"{folder.path}: {name} is missing")
        if name not in wanted:
            raise GateError(f"{folder.path}: {name} is one too many")
        if folder.specs[name] != wanted[name]:
            raise GateError(f"{folder.path}: found {folder.specs[name]}, expected {wanted[name]}")
    num_bytes = sum(spec.num_bytes for spec in wanted.values())
    with open_progress().stage("gate: files", total_bytes=num_bytes) as advance:
        for tensor in tensors:
            _compare_tensor(folder, tensor, stored, dtype, advance)


def compare_tokenizers(out: Path, tokenizer: Tokenizer, tokens: Int64[Tensor, "B S"]) -> str:
    """What to know before loading the folder's tokenizer; empty where AutoTokenizer will do.

    Raises:
        GateError: Loaded by either class it encodes the text of the tokens otherwise than ours.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # see `_reason_to_skip`

    texts = [tokenizer.decode(row.tolist()) for row in tokens]
    auto, plain = (
        _find_difference(loader.from_pretrained(out), tokenizer, texts)
        for loader in (AutoTokenizer, PreTrainedTokenizerFast)
    )
    if auto and plain:
        raise GateError(f"{out}: the tokenizer encodes a text otherwise {plain}")
    if auto:  # 5.23 gives every qwen2 model Qwen's own tokenizer, whatever its tokenizer.json says
        return (
            f"AutoTokenizer ignores tokenizer.json and encodes a text otherwise {auto}; load it "
            "with transformers.PreTrainedTokenizerFast, which encodes as here"
        )
    return ""


def compare_logits(
    ours: Float[Tensor, "B S V"], theirs: Float[Tensor, "B S V"], *, out: Path, tolerance: float
) -> float:
    """The largest difference, relative to the largest logit.

    Raises:
        GateError: It exceeds the tolerance, or is no number.
    """
    errors = (theirs - ours).abs() / ours.abs().max()
    difference = errors.max().item()
    if not difference <= tolerance:
        row, place, token = torch.unravel_index(errors.nan_to_num(torch.inf).argmax(), errors.shape)
        raise GateError(
            f"{out}: transformers' logits differ from ours by {difference:.1e} of the largest, "
            f"tolerance={tolerance:.1e}; most at sequence {row}, position {place}, token {token}: "
            f"{theirs[row, place, token]:.6g} instead of {ours[row, place, token]:.6g}"
        )
    return difference


def real_tokens(data: DataConfig, *, sequences: int = NUM_SEQUENCES) -> Int64[Tensor, "B S"]:
    """The beginning of the validation split.

    Raises:
        ValueError: The corpus is not prepared.
    """
    samples = open_samples(replace(data, verify=Verify.fast))
    rows = [samples[i].tokens[:MAX_TOKENS] for i in range(min(sequences, samples.num_samples))]
    return torch.stack([torch.from_numpy(row) for row in rows])


@torch.no_grad()
def our_logits(
    model: ModelConfig,
    tensors: Sequence[HubTensor],
    stored: StoredTensors,
    tokens: Int64[Tensor, "B S"],
    *,
    dtype: HubDtype,
) -> Float[Tensor, "B S V"]:
    """Our model's, with the checkpoint's weights rounded as the folder's are."""
    ours = Transformer(model).eval()
    state = {fragment.name: fragment.data for fragment in weight_fragments(ours)}
    for tensor in tensors:
        if not tensor.is_copy:
            values = stored.read(tensor.source, start=tensor.start, shape=tensor.shape)
            values = decode(encode(tensor, values, dtype)).flatten()
            state[tensor.source][tensor.start : tensor.start + len(values)] = values
    return ours.logits(tokens)


@torch.no_grad()
def their_logits(
    folder: HubFolder,
    tensors: Sequence[HubTensor],
    tokens: Int64[Tensor, "B S"],
    *,
    dtype: HubDtype,
) -> Float[Tensor, "B S V"]:
    """transformers'. Its FP8 needs a GPU, so such weights are given to it as fp32.

    Raises:
        GateError: It misses a tensor, or does not know one that is not MTP's.
    """
    import transformers  # not a dependency
    from transformers.utils import logging as hub_logging

    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    source: Path | None = folder.path
    loader = transformers.AutoModelForCausalLM
    if dtype is HubDtype.fp8:
        config = transformers.AutoConfig.from_pretrained(folder.path)
        del config.quantization_config
        state = {tensor.name: folder.read_values(tensor.name) for tensor in tensors}
        options |= {"config": config, "state_dict": state}
        source = None
        loader = getattr(transformers, config.architectures[0])
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # its table of what it did not load is read here instead
    try:
        theirs, info = loader.from_pretrained(source, **options)
    finally:
        hub_logging.set_verbosity(verbosity)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = [str(key) for key in info[problem]]
        if problem == "unexpected_keys":  # transformers has no MTP in the model itself
            found = [key for key in found if not is_mtp(key, theirs.config.num_hidden_layers)]
        if found:
            listed = ", ".join(sorted(found)[:5])
            raise GateError(f"{folder.path}: transformers reports {problem}: {listed}")
    return theirs.eval()(tokens).logits.float()


def is_mtp(name: str, num_layers: int) -> bool:
    """Whether the hub's name is one of a layer past the model's last."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return found is not None and int(found[1]) >= num_layers


def _find_difference(theirs: Any, tokenizer: Tokenizer, texts: list[str]) -> str:
    for text in texts:
        ids, wanted = theirs.encode(text, add_special_tokens=False), tokenizer.encode(text)
        if ids != wanted:
            places = range(len(wanted) + 1)
            place = next(i for i in places if ids[i : i + 1] != wanted[i : i + 1])
            found = f"{ids[place : place + 5]} instead of {wanted[place : place + 5]}"
            return f"from token {place} on ({found})"
    return ""


def _compare_tensor(
    folder: HubFolder,
    tensor: HubTensor,
    stored: StoredTensors,
    dtype: HubDtype,
    advance: Advance,
) -> None:
    values = stored.read(tensor.source, start=tensor.start, shape=tensor.shape)
    wanted = encode(tensor, values, dtype)
    for spec, expected in zip(stored_specs(tensor, dtype), wanted, strict=True):
        found = folder.read(spec.name)
        if not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
            count = int((found.float() != expected.float()).sum())
            largest = (found.float() - expected.float()).abs().max().item()
            raise GateError(
                f"{folder.path}: {spec.name} differs from the checkpoint's {tensor.source} in "
                f"{count} of {found.numel()} elements, by {largest:.3g} at most"
            )
        advance(spec.num_bytes)


def _reason_to_skip(tensors: Sequence[HubTensor]) -> str:
    if find_spec("transformers") is None:
        return "transformers is not installed; install it and export again"
    needed = MEMORY_FACTOR * 4 * sum(torch.Size(tensor.shape).numel() for tensor in tensors)
    available = psutil.virtual_memory().available
    if needed > available:
        return (
            f"the model needs about {needed / 1e9:.1f} GB of host memory in fp32, "
            f"{available / 1e9:.1f} GB are free; export on a larger host to compare them"
        )
    return ""
