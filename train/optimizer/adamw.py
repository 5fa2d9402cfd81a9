"""AdamW (arXiv:1711.05101) whose moments may be kept in fewer bits than it computes in."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from train.optimizer.moments import Moments, build_format, stretches

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.Optimizer):
    """AdamW over whole parameters or over ZeRO's flat parts of them alike.

    Parameters, gradients and every step of the computation are fp32, by torch's fused kernel;
    only between steps do the moments take the form that `moments` names. In fp32 this is
    `torch.optim.AdamW(fused=True)`, bit for bit.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        moments: Moments = Moments.fp32,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, defaults)
        self.format = build_format(moments)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "nothing is evaluated again"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group)

    @torch.no_grad()
    def update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """One step of one parameter; where moments are not kept in fp32, stretch by stretch, so
        that little of them exists in it at once."""
        assert parameter.grad is not None
        state = self.start(parameter)
        values, grad = parameter.view(-1), parameter.grad.view(-1)
        everything = [slice(0, parameter.numel())]
        for part in everything if self.format.is_read_in_place else stretches(parameter):
            first, second = (self.format.read(state, name, part) for name in MOMENTS)
            adamw(
                [values[part]],
                [grad[part]],
                [first],
                [second],
                [],
                [state["step"].clone()],  # the kernel counts up
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )
            self.format.write(state, MOMENTS[0], part, first)
            self.format.write(state, MOMENTS[1], part, second)
        state["step"] += 1

    def start(self, parameter: Tensor) -> dict[str, Any]:
        """The parameter's state; zeros if it has none yet."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in self.kept(parameter):
                self.format.start(state, name, parameter)
        return state

    def kept(self, parameter: Tensor) -> tuple[str, ...]:  # noqa: ARG002
        """Names of what is kept for a parameter: one number for each of its elements."""
        return MOMENTS

    def open_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """What is kept for a parameter, 1-D, to be saved or to be filled by a load."""
        state = self.start(parameter)
        return {name: self.format.open(state, name) for name in self.kept(parameter)}

    def finish_load(self, *, updates: int) -> None:
        """Take over what was filled into `open_state`, and the number of updates it has seen."""
        for parameter, state in self.state.items():
            state["step"].fill_(updates)
            for name in self.kept(parameter):
                self.format.close(state, name)
