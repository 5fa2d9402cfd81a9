"""A trained model out of a run's folder, on one device, without DeepSpeed."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from data.prepare import tokenizer_path
from data.tokenizer import Tokenizer, load_tokenizer
from model.backends import set_kernels
from model.transformer import Transformer
from train.checkpoint.checkpoints import Checkpoints, load
from train.checkpoint.manifest import Fragment
from train.config import CONFIG_FILE, RunConfig, read_config
from train.ema import Weights, check_average, stored_name
from train.ranks import Ranks


class Restored(NamedTuple):
    model: Transformer
    tokenizer: Tokenizer
    config: RunConfig
    step: int


def restore(
    run_dir: Path, *, ranks: Ranks, step: int | None = None, weights: Weights = Weights.trained
) -> Restored:
    """The model of a run's checkpoint (the newest that is whole, unless `step` names one).

    Raises:
        ValueError: There is no run, no such checkpoint, no average in it that is asked for, or it
            does not fit the run's config.
    """
    config = read_config(run_dir / CONFIG_FILE, RunConfig)
    checkpoints = Checkpoints(run_dir, keep=config.checkpoint.keep)
    manifest = checkpoints.choose(ranks, step=step)
    check_average(manifest, weights)
    tokenizer = load_tokenizer(tokenizer_path(config.data))
    if tokenizer.fingerprint != manifest.tokenizer:
        raise ValueError(
            f"the tokenizer in {tokenizer_path(config.data)} is not the one that the checkpoint "
            f"of step {manifest.step} was trained with; prepare the run's corpus again"
        )
    set_kernels(config.kernels)
    model = Transformer(config.model)
    wanted = [one._replace(name=stored_name(one.name, weights)) for one in weight_fragments(model)]
    load(checkpoints.path(manifest.step), manifest, wanted)
    model.to(device=ranks.device, dtype=config.precision.dtype.torch)
    return Restored(model.eval(), tokenizer, config, manifest.step)


def check_start(config: RunConfig) -> None:
    """Refuse, with a ValueError, a new run from weights that are not there.

    A run that has a checkpoint of its own continues from that and needs no other.
    """
    folder = config.init_from
    if folder is None or Checkpoints(Path(config.run_dir), keep=1).steps():
        return
    if not Checkpoints(Path(folder), keep=1).steps():
        raise ValueError(
            f"init_from={folder} holds no checkpoint; give the folder of a run that has saved one"
        )


def weight_fragments(model: nn.Module) -> list[Fragment]:
    """All of a whole model's weights and buffers as fragments to be filled."""
    weights = [
        Fragment(f"weight/{name}", tuple(parameter.shape), 0, parameter.detach().view(-1))
        for name, parameter in model.named_parameters()
    ]
    buffers = [
        Fragment(f"buffer/{name}", tuple(buffer.shape), 0, buffer.view(-1))
        for name, buffer in model.named_buffers()
    ]
    return weights + buffers
