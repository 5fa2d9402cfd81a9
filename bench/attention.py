"""`python -m bench.attention`: MLA, forward and backward, against transformers'.

The layer with its projections, in the sizes of `bench.moe`, over whole sequences; and the attention
itself, `model.attention.attend`, beside torch's `scaled_dot_product_attention` on the same tensors.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from bench.floors import cases_and_floors, name
from bench.moe import report, run
from bench.peer import fill, peer_config
from bench.sizes import Case
from bench.timing import median_seconds, prepare
from model.attention import attend
from model.mla import MLA
from model.rope import RopeConfig, rotation
from model.sequences import WholeSequences
from train.profile.report import Floors
from train.profile.work import Work

ROUNDS = 9


def main() -> None:
    device = prepare()
    for case, floors in cases_and_floors(device):
        size = f"{case.batch_size} x {case.seq_len} tokens of width {case.config.dim}"
        print(f"{case.name}: {size}, {name(case.dtype)}")
        time_layers(case, device, floors)
        time_attention(case, device, floors)


def time_layers(case: Case, device: torch.device, floors: Floors) -> None:
    config = case.config
    ours: nn.Module = MLA(
        config.attention,
        dim=config.dim,
        norm_eps=config.norm_eps,
        temperature=1.0,
        sequences=WholeSequences(),
    )
    theirs_config = peer_config(config, seq_len=case.seq_len, experts="grouped_mm")
    theirs: nn.Module = DeepseekV3Attention(theirs_config, layer_idx=0)
    for layer in (ours, theirs):
        layer.to(device, case.dtype)
        fill(layer, 0.02)
        for parameter in layer.parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
    x = torch.randn(case.batch_size, case.seq_len, config.dim, device=device)
    x = x.to(case.dtype).requires_grad_()
    positions = torch.arange(case.seq_len, device=device).expand(case.batch_size, -1)
    turn = rotation(RopeConfig(), positions, dim=config.attention.rope_head_dim)
    embeddings = DeepseekV3RotaryEmbedding(theirs_config).to(device)(x, positions)
    segments = [case.seq_len] * case.batch_size
    weights = sum(p.numel() for p in ours.parameters() if p.ndim > 1)
    work = Work(flops=6 * case.tokens * weights + core_flops(case))
    passes = {
        "ours": partial(run, lambda: ours(x, turn, segments=segments), ours, x),
        "transformers": partial(run, lambda: theirs(x, embeddings, None)[0], theirs, x),
    }
    report(case, "MLA layer", median_seconds(passes, rounds=ROUNDS), work, floors)


def core_flops(case: Case) -> float:
    """Of queries with keys and weights with values, under the causal mask."""
    return 6 * case.tokens * case.config.attention.product_dims * (case.seq_len + 1) / 2


def time_attention(case: Case, device: torch.device, floors: Floors) -> None:
    attention = case.config.attention
    key_width = attention.nope_head_dim + attention.rope_head_dim
    shape = (case.batch_size, case.seq_len, attention.num_heads)
    query, key, value = (
        torch.randn(*shape, width, device=device).to(case.dtype).requires_grad_()
        for width in (key_width, key_width, attention.v_head_dim)
    )

    def ours() -> Tensor:
        segments = [case.seq_len] * case.batch_size
        return attend(query, key, value, scale=key_width**-0.5, segments=segments)

    def plain() -> Tensor:
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(*heads_first, is_causal=True)

    passes = {
        "ours": partial(run, ours, None, query, key, value),
        "torch": partial(run, plain, None, query, key, value),
    }
    work = Work(flops=core_flops(case))
    report(case, "attention alone", median_seconds(passes, rounds=ROUNDS), work, floors)


if __name__ == "__main__":
    main()
