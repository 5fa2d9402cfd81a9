"""Chunks: what bounds the rows that a rank's experts receive at once.

P ranks, L experts of each, E = P * L experts, C chunks.
"""

import torch
from jaxtyping import Int64
from torch import Tensor


def split_into_chunks(counts: Int64[Tensor, "P E"], *, limit: int | None) -> Int64[Tensor, "C P E"]:
    """Of the rows that each rank has for each expert, how many travel in which chunk.

    The rows for a rank's experts stand in a queue, by expert and then by the rank they come from.
    A chunk is the next part of every queue: at most `limit` rows, and equal parts of a queue. There
    are as many chunks as the longest queue needs, one if there is no limit.
    """
    num_ranks = counts.shape[0]
    of_owners = counts.unflatten(1, (num_ranks, -1))  # [from, to, L]
    lengths = of_owners.sum(dim=(0, 2))[:, None]  # [to, 1]
    longest = int(lengths.max())
    if limit is None or longest <= limit:
        return counts[None]
    num_chunks = -(-longest // limit)
    queues = of_owners.permute(1, 2, 0).flatten(1)  # [to, L * from]
    ends = queues.cumsum(dim=1)
    part = (lengths + num_chunks - 1) // num_chunks
    borders = torch.arange(num_chunks + 1)[:, None, None] * part  # [C + 1, to, 1]
    done = torch.minimum((borders - (ends - queues)).clamp(min=0), queues)
    in_chunk = done.diff(dim=0).unflatten(2, (-1, num_ranks))  # [C, to, L, from]
    return in_chunk.permute(0, 3, 1, 2).flatten(2)
