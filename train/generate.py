"""Text from a trained model, token by token over the latent cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from model.cache import Cache
from model.transformer import Transformer
from train.ranks import alone
from train.restore import restore


@dataclass(slots=True, kw_only=True)
class GenerateConfig:
    #: Folder of the run whose model writes.
    run_dir: str
    #: Step of the checkpoint; null takes the newest.
    step: int | None = None
    #: Text to be continued.
    prompt: str = ""
    #: Tokens to write at most; the end of the document comes earlier if the model says so.
    max_new_tokens: int = 128
    #: Divides the logits; 0 always takes the likeliest token.
    temperature: float = 0.8
    #: Tokens are drawn from the likeliest ones that make up this share of the probability.
    top_p: float = 0.95
    #: Decides what is drawn.
    seed: int = 0


def check_generate(config: GenerateConfig) -> None:
    """Refuse, with a ValueError, settings under which nothing can be drawn."""
    if config.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={config.max_new_tokens} must be at least 1")
    if config.temperature < 0:
        raise ValueError(f"temperature={config.temperature} must not be negative; 0 is greedy")
    if not 0 < config.top_p <= 1:
        raise ValueError(f"top_p={config.top_p} must lie in (0, 1]")


def generate(config: GenerateConfig) -> Iterator[str]:
    """The continuation of the prompt, in pieces as they come; together they are its text.

    Raises:
        ValueError: See `check_generate` and `restore`.
    """
    check_generate(config)
    ranks = alone()
    restored = restore(Path(config.run_dir), ranks=ranks, step=config.step)
    tokenizer = restored.tokenizer
    prompt = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(config.prompt)]])
    shown, written = "", list[int]()
    for token in sample_tokens(
        restored.model,
        prompt.to(ranks.device),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
    ):
        if token == tokenizer.eos_id:
            break
        written.append(token)
        text = tokenizer.decode(written)
        if not text.endswith("\ufffd"):  # a character's bytes may come in several tokens
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(written)[len(shown) :]


@torch.no_grad()
def sample_tokens(
    model: Transformer,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[int]:
    """Tokens after `prompt` [1, S], each fed back; past ones are only in the cache."""
    generator = torch.Generator().manual_seed(seed)
    capacity = prompt.shape[1] + max_new_tokens
    caches = [Cache(capacity=capacity) for _ in model.layers]
    tokens = prompt
    for _ in range(max_new_tokens):
        logits = model.predict(model.decode(tokens, caches)[0, -1]).cpu()
        token = draw(logits, temperature=temperature, top_p=top_p, generator=generator)
        yield token
        tokens = prompt.new_tensor([[token]])


def draw(
    logits: Float[Tensor, " V"], *, temperature: float, top_p: float, generator: torch.Generator
) -> int:
    """One token: the likeliest, or a draw from the smallest set that holds `top_p`."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, tokens = (logits / temperature).softmax(dim=-1).sort(descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0)
    return int(tokens[torch.multinomial(kept, 1, generator=generator)])
