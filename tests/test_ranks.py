import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import ranks, run_ranks


def _rank_doubled() -> torch.Tensor:
    doubled = torch.tensor(2.0 * dist.get_rank(), requires_grad=True)
    doubled.square().backward()
    return doubled.grad


@pytest.mark.parametrize("number", [3])
@ranks(2)
def test_a_test_runs_on_every_rank_with_its_parameters(number: int) -> None:
    total = torch.tensor(number)
    dist.all_reduce(total)
    assert total == 2 * number


def test_results_come_back_in_order_of_ranks() -> None:
    assert run_ranks(3, _rank_doubled) == [0.0, 4.0, 8.0]


def test_the_failing_rank_is_named_with_its_traceback() -> None:
    def fail_on_one() -> None:
        if dist.get_rank() == 1:
            raise KeyError("the reason")
        dist.barrier()

    with pytest.raises(AssertionError, match=r"(?s)rank 1:.*fail_on_one.*the reason"):
        run_ranks(2, fail_on_one)


def test_a_rank_that_hangs_is_ended_and_says_where_it_stood() -> None:
    def hang() -> None:
        if dist.get_rank() == 0:
            time.sleep(60)

    with pytest.raises(AssertionError, match=r"(?s)rank 0:.*in hang"):
        run_ranks(2, hang, seconds=3)
