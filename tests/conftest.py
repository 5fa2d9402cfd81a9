import pytest
import torch

# Tensors here are tiny: threads would only wait for each other, and beside other processes long.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_tensors_every_time() -> None:
    torch.manual_seed(0)
