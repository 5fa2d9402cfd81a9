"""Generation's form of the model against training's."""

import pytest
import torch

from model.cache import Cache
from tests.model.small import small_config, small_model


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
