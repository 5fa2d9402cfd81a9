"""Tokens after prompts, several prompts at a time: one per forward pass, or more with drafts.

B rows (one per prompt), S tokens of the longest prompt.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from model.cache import Cache
from model.sampling import SamplingConfig, draw
from model.transformer import Transformer


class Pass(NamedTuple):
    """What one forward pass of the model gives."""

    tokens: list[list[int]]  # per row, the eos included; nothing for rows that had ended
    drafts: int  # that the pass checked
    accepted: int  # of these


class Padded(NamedTuple):
    """Prompts as rows that end together."""

    tokens: Int64[Tensor, "B S"]
    padding: Int64[Tensor, " B"]  # tokens at the left of each row that are none


class Rows:
    """Each row's own randomness, and how many tokens it may still get."""

    def __init__(
        self,
        count: int,
        *,
        sampling: SamplingConfig,
        max_new_tokens: int,
        eos_id: int,
        vocab_size: int | None,
    ) -> None:
        self.sampling = sampling
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.generators = [torch.Generator().manual_seed(sampling.seed) for _ in range(count)]
        self.room = [max_new_tokens] * count

    @property
    def live(self) -> list[bool]:
        """Which rows have not ended."""
        return [room > 0 for room in self.room]

    def draw(self, logits: Float[Tensor, "B V"], *, where: list[bool]) -> Int64[Tensor, " B"]:
        """A token per row; one that means nothing, and costs no randomness, outside `where`."""
        uniform = [
            torch.rand((), generator=generator, dtype=torch.float64).item() if is_drawn else 0.0
            for generator, is_drawn in zip(self.generators, where, strict=True)
        ]
        uniform_tensor = torch.tensor(uniform, dtype=torch.float64, device=logits.device)
        return draw(logits[:, : self.vocab_size], uniform_tensor, self.sampling)

    def take(self, offered: list[list[int]]) -> list[list[int]]:
        """What the rows get of the offered tokens: none past their eos or their limit."""
        taken: list[list[int]] = [[] for _ in offered]
        for row, tokens in enumerate(offered):
            for token in tokens[: self.room[row]]:
                taken[row].append(token)
                self.room[row] -= 1
                if token == self.eos_id:
                    self.room[row] = 0
                    break
        return taken


@torch.no_grad()
def write_tokens(
    model: Transformer,
    prompts: list[list[int]],
    *,
    sampling: SamplingConfig,
    max_new_tokens: int,
    eos_id: int,
    vocab_size: int | None = None,
) -> Iterator[Pass]:
    """One token per row and pass, until every row has come to its eos or limit.

    A row's tokens are those that its prompt gets alone. No prompt may be empty. `vocab_size` is the
    tokenizer's, where the model has room for more tokens than that.
    """
    rows = Rows(
        len(prompts),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        vocab_size=vocab_size,
    )
    tokens, padding = pad_left(prompts, device=model.embed.weight.device)
    capacity = tokens.shape[1] + max_new_tokens
    caches = [Cache(capacity=capacity) for _ in model.layers]
    while any(rows.live):
        hidden = model.decode(tokens, caches, padding=padding)
        new = rows.draw(model.predict(hidden[:, -1]), where=rows.live)
        yield Pass(rows.take([[token] for token in new.tolist()]), 0, 0)
        tokens = new[:, None]


@torch.no_grad()
def write_tokens_with_drafts(
    model: Transformer,
    prompts: list[list[int]],
    *,
    sampling: SamplingConfig,
    max_new_tokens: int,
    eos_id: int,
    vocab_size: int | None = None,
) -> Iterator[Pass]:
    """The tokens of `write_tokens` in fewer passes: each also checks a token that MTP guessed.

    The token after the last known one is drawn as ever, from the model's own logits. Where it is
    the guess, the logits after the guess hold too, and a second token is drawn; where it isn't,
    the guess is forgotten. So drafts change neither a draw nor, at any temperature, the
    distribution (speculative sampling, arXiv:2302.01318, with a draft that is sure of its guess).
    """
    rows = Rows(
        len(prompts),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        vocab_size=vocab_size,
    )
    tokens, padding = pad_left(prompts, device=model.embed.weight.device)
    capacity = tokens.shape[1] + max_new_tokens + 2  # 2: of a row at its limit
    caches = [Cache(capacity=capacity) for _ in model.layers]
    mtp_cache = Cache(capacity=capacity)

    hidden = model.decode(tokens, caches, padding=padding)
    last = rows.draw(model.predict(hidden[:, -1]), where=rows.live)
    yield Pass(rows.take([[token] for token in last.tolist()]), 0, 0)
    following = torch.cat((tokens[:, 1:], last[:, None]), dim=1)
    ahead = model.draft(hidden, following, mtp_cache, padding=padding)
    guess = model.predict(ahead[:, -1]).argmax(dim=-1)
    while any(live := rows.live):
        hidden = model.decode(torch.stack((last, guess), dim=1), caches, padding=padding)
        logits = model.predict(hidden)  # [B, 2, V]
        is_live = torch.tensor(live, device=guess.device)
        first = rows.draw(logits[:, 0], where=live)
        is_right = is_live & (first == guess)
        second = rows.draw(logits[:, 1], where=is_right.tolist())
        following = torch.stack((first, second), dim=1)
        advance = is_live.long() + is_right.long()
        offered = zip(following.tolist(), advance.tolist(), strict=True)
        yield Pass(
            rows.take([pair[:count] for pair, count in offered]),
            drafts=sum(live),
            accepted=int(is_right.sum()),
        )

        ahead = model.draft(hidden, following, mtp_cache, padding=padding)
        guesses = model.predict(ahead).argmax(dim=-1)  # [B, 2], after first and second
        last = second.where(is_right, first)
        guess = guesses[:, 1].where(is_right, guesses[:, 0])
        padding = forget([*caches, mtp_cache], 2 - advance, padding=padding)


def pad_left(prompts: list[list[int]], *, device: torch.device) -> Padded:
    """The prompts as rows that end together; token 0 stands where there is none."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * count + prompt for count, prompt in zip(padding, prompts, strict=True)]
    return Padded(torch.tensor(rows, device=device), torch.tensor(padding, device=device))


def forget(
    caches: list[Cache], counts: Int64[Tensor, " B"], *, padding: Int64[Tensor, " B"]
) -> Int64[Tensor, " B"]:
    """The rows' padding once each has dropped as many of its newest tokens as `counts` says.

    The rows end together again: one that drops more than another moves to the right.
    """
    length = caches[0].length
    kept = length - padding - counts
    new_length = int(kept.max())
    new_padding = new_length - kept
    is_moved = not torch.equal(new_padding, padding)
    for cache in caches:
        if is_moved:
            cache.shift(new_padding - padding)
        cache.forget(length - new_length)
    return new_padding
