"""`python -m bench.documents`: attention inside documents against the same batch unmasked.

Forward and backward of `model.attention.attend`, fp32, 4 x 2048 tokens, 8 heads of 48/32 as in the
bench of a step, documents of random (log-normal) lengths. Masked attention has fewer pairs to
look at, so anything above 1 is the cost of keeping documents apart. On the CPU it is the CPU time
of one thread.
"""

from functools import partial

import torch
from torch import Tensor

from bench.floors import describe, measure_floors
from bench.rows import Row, note
from bench.timing import cpu_seconds, median_seconds, prepare, seconds
from model.attention import attend
from train.profile.work import Work

BATCH_SIZE, SEQ_LEN, HEADS, KEY_WIDTH, VALUE_WIDTH = 4, 2048, 8, 48, 32
MEAN_LENGTHS = (10, 100, 1000)
ROUNDS = 7


def draw_segments(mean: int) -> list[int]:
    """Lengths of documents that fill the rows, the last of each row cut."""
    lengths = torch.distributions.LogNormal(-0.5, 1.0)
    segments = []
    for _ in range(BATCH_SIZE):
        left = SEQ_LEN
        while left:
            segments.append(min(left, 1 + int(mean * lengths.sample())))
            left -= segments[-1]
    return segments


def work_of(segments: list[int]) -> Work:
    """Products of the pairs that see each other, forward and twice backward."""
    pairs = sum(length * (length + 1) / 2 for length in segments)
    return Work(flops=6 * pairs * HEADS * (KEY_WIDTH + VALUE_WIDTH))


def _pass(inputs: list[Tensor], segments: list[int]) -> None:
    mixed = attend(*inputs, scale=KEY_WIDTH**-0.5, segments=segments)
    torch.autograd.grad(mixed.sum(), inputs)


def main() -> None:
    device = prepare()
    torch.set_num_threads(1)
    inputs = [
        torch.randn(BATCH_SIZE, SEQ_LEN, HEADS, width, device=device, requires_grad=True)
        for width in (KEY_WIDTH, KEY_WIDTH, VALUE_WIDTH)
    ]
    layouts = {"unmasked": [SEQ_LEN] * BATCH_SIZE}
    for mean in MEAN_LENGTHS:
        segments = draw_segments(mean)
        layouts[f"{len(segments)} documents of about {mean}"] = segments
    passes = {name: partial(_pass, inputs, segments) for name, segments in layouts.items()}
    clock = seconds if device.type == "cuda" else cpu_seconds
    floors = measure_floors(device, torch.float32)
    medians = median_seconds(passes, rounds=ROUNDS, clock=clock)
    for name, duration in medians.items():
        note(
            Row(
                f"attention, {name}",
                describe(duration, work_of(layouts[name]), floors),
                f"unmasked: {medians['unmasked'] * 1e3:.2f} ms",
                f"{duration / medians['unmasked']:.2f}",
            )
        )


if __name__ == "__main__":
    main()
