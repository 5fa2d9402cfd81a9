"""Rows on their way between ranks while something else is computed.

An all-to-all begins when rows depart, and is waited for only where they arrive; in the backward
pass their gradients depart where the rows arrived, and arrive where they departed. What the forward
pass computes in between, the backward pass differentiates in between: autograd takes what was made
last first.

R rows that depart, N rows that arrive, D width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.whereabouts import HERE
from model.wire import decode, encode


class Route(NamedTuple):
    """Who sends how many rows to whom."""

    sent: list[int]  # rows for each rank
    received: list[int]  # rows from each rank
    group: dist.ProcessGroup
    name: str  # for whoever asks where a rank waits
    place: str

    def back(self) -> "Route":
        return self._replace(sent=self.received, received=self.sent, name=f"{self.name}, backward")


class Wire(NamedTuple):
    """In which form rows travel: what is sent of them, and what is read from that."""

    write: Callable[[Tensor], Tensor]
    read: Callable[..., Tensor]


PLAIN = Wire(Tensor.contiguous, lambda message, **_: message)
# A byte for each number; the experts, which round to the same numbers, lose none.
IN_FP8 = Wire(encode, lambda message, width, dtype: decode(message, width=width).to(dtype))


class Flight:
    """One message, from its departure to its landing."""

    def __init__(self, rows: Tensor, route: Route, wire: Wire) -> None:
        self._route = route
        self._wire = wire
        self._form = {"width": rows.shape[1], "dtype": rows.dtype}
        self._message = wire.write(rows)  # held until it has been read
        self._arriving = self._message.new_empty(sum(route.received), self._message.shape[1])
        self._work = dist.all_to_all_single(
            self._arriving,
            self._message,
            route.received,
            route.sent,
            group=route.group,
            async_op=True,
        )

    def land(self) -> Tensor:
        """The rows that arrive here. On a GPU its stream waits for them, the host does not."""
        route = self._route
        with HERE.doing(route.name, route.place, sent=route.sent, received=route.received):
            self._work.wait()
        return self._wire.read(self._arriving, **self._form)


class Journey:
    """Rows that have departed; their gradients come back the same way."""

    def __init__(
        self, rows: Float[Tensor, "R D"], route: Route, *, there: Wire = PLAIN, back: Wire = PLAIN
    ) -> None:
        self._line = _Line(route, there, back)
        self._ticket: Tensor = _Depart.apply(rows, self._line)

    def arrive(self) -> Float[Tensor, "N D"]:
        """The rows that arrive here; to be called once."""
        rows: Tensor = _Arrive.apply(self._ticket, self._line)
        return rows


class Here(NamedTuple):
    """Rows that need not travel."""

    rows: Float[Tensor, "N D"]

    def arrive(self) -> Float[Tensor, "N D"]:
        return self.rows


class _Line:
    """What departure and arrival, two nodes of autograd's graph, share: the message between them.

    Through the graph goes but a ticket, a tensor of the rows' shape that takes no memory.
    """

    def __init__(self, route: Route, there: Wire, back: Wire) -> None:
        self._route = route
        self._there = there
        self._back = back
        self._flight: Flight | None = None

    def depart(self, rows: Tensor) -> Tensor:
        return self._take_off(rows, self._route, self._there)

    def depart_back(self, grad: Tensor) -> Tensor:
        return self._take_off(grad, self._route.back(), self._back)

    def arrive(self) -> Tensor:
        assert self._flight is not None, "what arrives has departed"
        flight, self._flight = self._flight, None
        return flight.land()

    def _take_off(self, rows: Tensor, route: Route, wire: Wire) -> Tensor:
        assert self._flight is None, "one message at a time"
        self._flight = Flight(rows, route, wire)
        return rows.new_zeros(()).expand(sum(route.received), rows.shape[1])


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, line: _Line) -> Tensor:
        ctx.line = line
        return line.depart(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _ticket: Tensor) -> tuple[Tensor, None]:
        return ctx.line.arrive(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, line: _Line) -> Tensor:
        ctx.line, ctx.shape = line, ticket.shape
        return line.arrive()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.line.depart_back(grad)
        return grad.new_zeros(()).expand(ctx.shape), None
