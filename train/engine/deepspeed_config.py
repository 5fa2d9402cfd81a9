"""DeepSpeed's own config, made from the run's."""

from typing import Any

import torch

from train.config import RunConfig
from train.layout.parallel import Offload
from train.precision import Dtype


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """Accumulation is ours (`Engine.backward`), hence 1 there."""
    parallel = config.parallel
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": parallel.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_norm,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "stage3_param_persistence_threshold": parallel.keep_whole,
            "overlap_comm": parallel.overlap_comm,
            "contiguous_gradients": True,  # without it, wrong gradients under ZeRO-1 with EP
            "reduce_bucket_size": parallel.reduce_bucket_size,
            "allgather_bucket_size": parallel.reduce_bucket_size,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if config.precision.dtype is Dtype.bf16:
        # The ZeRO optimizer, which pipelines have, lets others than fp32 pass without this.
        values["bf16"] = {"enabled": True, "check_grad_overflow": parallel.pipeline > 1}
    pin = torch.cuda.is_available()
    for name, device in (
        ("offload_optimizer", parallel.offload_optimizer),
        ("offload_param", parallel.offload_parameters),
    ):
        if device is not Offload.none:  # to DeepSpeed a disk is host memory: train/engine/nvme.py
            values["zero_optimization"][name] = {
                "device": "cpu",
                "pin_memory": pin and device is Offload.cpu,
            }
    # DeepSpeed would want its own CPUAdam, which is compiled at the first start. Ours runs torch's
    # fused kernel on the CPU too.
    values["zero_force_ds_cpu_optimizer"] = False
    return values
