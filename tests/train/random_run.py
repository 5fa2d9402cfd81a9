"""A run's folder as training leaves it, with random weights instead of trained ones."""

from pathlib import Path
from typing import Any

import torch

from data.prepare import tokenizer_path
from data.tokenizer import load_tokenizer
from model.config import ModelConfig
from model.transformer import Transformer
from tests.train.tiny import tiny_run
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.manifest import Fragment
from train.config import CONFIG_FILE, RunConfig, write_config
from train.ranks import alone


def random_state(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights and biases under their logical names, nothing at its initial value."""
    state: dict[str, torch.Tensor] = {}
    with torch.device("meta"):
        empty = Transformer(model)
    for name, parameter in empty.named_parameters():
        offset = 1.0 if "norm" in name else 0.0
        state[f"weight/{name}"] = torch.randn(parameter.shape) * 0.2 + offset
    for name, buffer in empty.named_buffers():
        has_bias = model.moe is not None and model.moe.router.bias
        state[f"buffer/{name}"] = torch.randn(buffer.shape) * 0.1 * has_bias
    return state


def random_run(
    folder: Path,
    corpus: Path,
    *,
    model: ModelConfig,
    state: dict[str, torch.Tensor] | None = None,
    **changes: Any,
) -> RunConfig:
    """A run with a checkpoint of step 7, in uneven pieces as several ranks would write them.

    It holds the tensors of `state`, or random ones.
    """
    config = tiny_run(folder, model=model, **changes)
    config.data.folder = str(corpus)
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True)
    write_config(config, run_dir / CONFIG_FILE)
    fragments = []
    for name, values in (state or random_state(model)).items():
        flat, start = values.flatten(), 0
        for data in flat.split(max(len(flat) // 3 + 1, 5)):
            fragments.append(Fragment(name, tuple(values.shape), start, data))
            start += len(data)
    about: dict[str, Any] = {key: {} for key in ("progress", "layout", "versions", "config")}
    about["tokenizer"] = load_tokenizer(tokenizer_path(config.data)).fingerprint
    Checkpoints(run_dir, keep=1).save(7, fragments, ranks=alone(), about=about)
    return config
