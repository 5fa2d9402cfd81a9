import os

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton, which reads it then
    os.environ["TRITON_INTERPRET"] = "1"

# Tensors here are tiny: threads would only wait for each other, and beside other processes long.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_tensors_every_time() -> None:
    torch.manual_seed(0)
