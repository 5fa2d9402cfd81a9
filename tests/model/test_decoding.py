"""Generation's form of the model against training's; many rows and drafts against one and none."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from model.cache import Cache
from model.config import ModelConfig
from model.decoding import Pass, forget, pad_left, write_tokens, write_tokens_with_drafts
from model.gqa import GQAConfig
from model.init import initialise
from model.sampling import SamplingConfig
from model.transformer import Transformer
from tests.model.small import small_config, small_model

GREEDY = SamplingConfig(temperature=0.0)
WARM = SamplingConfig(temperature=1.0, top_p=0.9, seed=5)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1, 8], [1, 6, 1, 8, 0, 3]]
NO_EOS = -1


def config_with(attention: str) -> ModelConfig:
    """Small, with MTP."""
    config = small_config(mtp_depth=1)
    if attention == "gqa":
        return replace(config, attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=6))
    return config


@pytest.fixture(scope="module", params=["mla", "gqa"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return small_model(config_with(request.param)).eval()


@pytest.fixture(scope="module", params=["mla", "gqa"])
def trained(request: pytest.FixtureRequest) -> Transformer:
    """A model, and MTP in it, that often know how a noisy cycle of tokens goes on."""
    model = Transformer(config_with(request.param))
    initialise(model, seed=1, std=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    successor = torch.randperm(48, generator=generator)
    for _ in range(20):
        tokens = [torch.randint(48, (16,), generator=generator)]
        for _ in range(16):
            noise = torch.randint(48, (16,), generator=generator)
            is_noise = torch.rand(16, generator=generator) < 0.2
            tokens.append(noise.where(is_noise, successor[tokens[-1]]))
        rows = torch.stack(tokens, dim=1)  # [16, 17]
        positions = torch.arange(16).expand(16, 16)
        sums = model(
            *(rows[:, :-1], rows[:, 1:], positions, torch.ones(16, 16, dtype=torch.bool)),
            segments=[16] * 16,
        )
        optimizer.zero_grad()
        ((sums.loss + sums.mtp_loss.sum()) / 256).backward()
        optimizer.step()
    return model.eval()


class Written(NamedTuple):
    rows: list[list[int]]
    passes: list[Pass]


def write(
    model: Transformer,
    prompts: list[list[int]],
    *,
    sampling: SamplingConfig = GREEDY,
    max_new_tokens: int = 12,
    eos_id: int = NO_EOS,
    draft: bool = False,
) -> Written:
    written = write_tokens_with_drafts if draft else write_tokens
    passes = list(
        written(model, prompts, sampling=sampling, max_new_tokens=max_new_tokens, eos_id=eos_id)
    )
    rows = [sum((done.tokens[row] for done in passes), list[int]()) for row in range(len(prompts))]
    return Written(rows, passes)


@pytest.mark.parametrize("write_some", [write_tokens, write_tokens_with_drafts])
def test_a_model_with_room_for_more_tokens_writes_only_those_that_the_tokenizer_has(
    model: Transformer, write_some: Callable[..., Iterator[Pass]]
) -> None:
    hot = SamplingConfig(temperature=2.0, top_p=1.0)
    asked = {"sampling": hot, "max_new_tokens": 20, "eos_id": NO_EOS}
    written = [done.tokens for done in write_some(model, PROMPTS, vocab_size=12, **asked)]
    tokens = {token for rows in written for row in rows for token in row}
    assert len(tokens) > 6
    assert max(tokens) < 12


@pytest.mark.parametrize("steps", [[12], [1] * 12, [5, 1, 4, 1, 1]])
@pytest.mark.parametrize("q_lora_rank", [None, 10])
@torch.no_grad()
def test_decoding_in_any_steps_equals_the_full_forward(
    steps: list[int], q_lora_rank: int | None
) -> None:
    config = small_config()
    config.attention.q_lora_rank = q_lora_rank
    model = small_model(config)
    tokens = torch.randint(config.vocab_size, (3, 12))
    wanted = model.logits(tokens)
    caches = [Cache(capacity=12) for _ in model.layers]
    place = 0
    for new in tokens.split(steps, dim=1):
        logits = model.predict(model.decode(new, caches)[:, -1])
        place += new.shape[1]
        torch.testing.assert_close(logits, wanted[:, place - 1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_drafts_in_any_steps_are_what_mtp_is_trained_to_predict(model: Transformer) -> None:
    tokens = torch.randint(48, (2, 10))
    hidden = model.decode(tokens[:, :9], [Cache(capacity=9) for _ in model.layers])
    cache, states = Cache(capacity=9), []
    for place, new in enumerate(hidden.split([5, 1, 3], dim=1)):
        start = [0, 5, 6][place]
        following = tokens[:, start + 1 : start + 1 + new.shape[1]]
        states.append(model.draft(new, following, cache))
    logits = model.predict(torch.cat(states, dim=1))[:, :8]
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 2:].flatten(), reduction="sum"
    )
    targets = tokens[:, 1:].clone()
    is_real = torch.ones_like(targets, dtype=torch.bool)
    positions = torch.arange(9).expand_as(targets)
    sums = model(tokens[:, :9], targets, positions, is_real, segments=[9, 9])
    torch.testing.assert_close(sums.mtp_loss[0], wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_at_the_left_changes_no_row(model: Transformer) -> None:
    tokens, padding = pad_left(PROMPTS, device=torch.device("cpu"))
    states = model.decode(
        tokens, [Cache(capacity=tokens.shape[1]) for _ in model.layers], padding=padding
    )
    for row, prompt in enumerate(PROMPTS):
        alone = model.logits(torch.tensor([prompt]))[0]
        got = model.predict(states[row, -len(prompt) :])
        torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_greedy_tokens_are_the_likeliest_of_full_forward_passes(model: Transformer) -> None:
    [got], _ = write(model, PROMPTS[:1])
    tokens = PROMPTS[0]
    for token in got:
        assert token == model.logits(torch.tensor([tokens]))[0, -1].argmax()
        tokens = [*tokens, token]
    assert len(got) == 12


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("draft", [False, True])
def test_each_row_is_what_its_prompt_gets_alone(
    sampling: SamplingConfig, draft: bool, model: Transformer
) -> None:
    together = write(model, PROMPTS, sampling=sampling, draft=draft).rows
    assert together == [
        write(model, [prompt], sampling=sampling, draft=draft).rows[0] for prompt in PROMPTS
    ]


def test_each_row_ends_at_its_own_eos(model: Transformer) -> None:
    free = write(model, PROMPTS).rows
    eos_id = free[2][4]
    for draft in (False, True):
        rows = write(model, PROMPTS, eos_id=eos_id, draft=draft).rows
        assert rows == [row[: row.index(eos_id) + 1] if eos_id in row else row for row in free], (
            f"{draft=}"
        )
    assert len({len(row) for row in rows}) > 1


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one row", "rows"])
def test_drafts_change_no_token(
    prompts: list[list[int]], sampling: SamplingConfig, model: Transformer
) -> None:
    plain = write(model, prompts, sampling=sampling)
    assert write(model, prompts, sampling=sampling, draft=True).rows == plain.rows


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one row", "rows"])
def test_right_drafts_spare_passes_and_change_no_token(
    prompts: list[list[int]], sampling: SamplingConfig, trained: Transformer
) -> None:
    plain = write(trained, prompts, sampling=sampling, max_new_tokens=24)
    rows, passes = write(trained, prompts, sampling=sampling, max_new_tokens=24, draft=True)
    assert rows == plain.rows
    assert len(passes) < len(plain.passes) == 24
    drafts, accepted = (sum(column) for column in zip(*(done[1:] for done in passes), strict=True))
    assert 0 < accepted <= drafts
    # A row has its first pass and one per draft; each gives a token, and one more where the draft
    # was right, except that the limit may cut a row's last pair.
    offered = len(prompts) + drafts + accepted
    assert 0 <= offered - 24 * len(prompts) <= len(prompts)


def test_the_seed_decides_what_is_drawn(model: Transformer) -> None:
    assert write(model, PROMPTS, sampling=WARM).rows == write(model, PROMPTS, sampling=WARM).rows
    other = write(model, PROMPTS, sampling=replace(WARM, seed=6)).rows
    assert write(model, PROMPTS, sampling=WARM).rows != other


@pytest.mark.gpu
def test_a_cuda_device_writes_the_cpus_tokens(model: Transformer) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    there = small_model(model.config).cuda().eval()
    for sampling in (GREEDY, WARM):
        wanted = write(model, PROMPTS, sampling=sampling).rows
        assert write(there, PROMPTS, sampling=sampling).rows == wanted
        assert write(there, PROMPTS, sampling=sampling, draft=True).rows == wanted


def test_forgetting_keeps_each_rows_oldest_tokens() -> None:
    cache = Cache(capacity=6)
    tokens, padding = pad_left([[1, 2, 3, 4, 5], [6, 7, 8], [9]], device=torch.device("cpu"))
    values = tokens[..., None].float()
    cache.extend(values, values)
    padding = forget([cache], torch.tensor([2, 0, 1]), padding=padding)
    held = cache.extend(torch.zeros(3, 1, 1), torch.zeros(3, 1, 1)).first[..., 0]
    kept = [row[count:].tolist() for row, count in zip(held, padding.tolist(), strict=True)]
    assert kept == [[1, 2, 3, 0], [6, 7, 8, 0], [0]]


def test_the_cache_holds_latents_and_rotated_keys_only() -> None:
    cache = Cache(capacity=7)
    assert cache.nbytes() == 0
    first, second = torch.randn(2, 3, 5), torch.randn(2, 1, 5)
    cache.extend(first, first[..., :2])
    held = cache.extend(second, second[..., :2])
    assert torch.equal(held.first, torch.cat((first, second), dim=1))
    assert torch.equal(held.second, held.first[..., :2])
    assert cache.length == 4
    assert cache.nbytes() == 2 * 7 * (5 + 2) * 4
