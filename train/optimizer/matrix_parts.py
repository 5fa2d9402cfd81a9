"""Which matrices a flat part of ZeRO's consists of, and the rest of those that its borders cut.

ZeRO lays the parameters of a group one after the other and cuts the row into equal parts, one per
rank of the group, wherever that falls. Each border cuts at most one matrix, so a part has at most
two that continue in others; only these are sent.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor


class Matrices(NamedTuple):
    """Matrices of one shape, one after the other. Places count from the part's first element."""

    start: int  # of the first; negative where it begins in an earlier rank's part
    num_matrices: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """Elements of one matrix."""
        return self.rows * self.columns

    @property
    def stop(self) -> int:
        return self.start + self.num_matrices * self.numel

    def within(self, size: int) -> slice:
        """Their elements that the part has."""
        return slice(max(self.start, 0), min(self.stop, size))


class MatrixParts:
    """The matrices of a part of `size` elements: those that are whole in it, and those cut."""

    def __init__(
        self, matrices: Iterable[Matrices], *, size: int, group: dist.ProcessGroup | None = None
    ) -> None:
        """`matrices` are the parameters that the part has elements of, stacks or single ones.

        The ranks of `group` have parts of the same size, in the order of ranks; without a group
        the part is all there is.
        """
        self.size = size
        self.whole: list[Matrices] = []
        self.cut: list[Matrices] = []
        self._group = group
        for stack in sorted(matrices):
            first = max(0, -(stack.start // stack.numel))
            last = (min(stack.stop, size) - stack.start) // stack.numel
            if stack.start < 0 and stack.start % stack.numel:
                self._add_cut(stack, first - 1)
            if first < last:
                start = stack.start + first * stack.numel
                self.whole.append(stack._replace(start=start, num_matrices=last - first))
            if stack.stop > size and last >= first:
                self._add_cut(stack, last)

    def gather(self, update: Tensor) -> list[Tensor]:
        """The cut matrices [rows, columns], put together from all ranks that have a part of them.

        Every rank of the group calls this. A rank receives what it lacks of at most two matrices,
        and sends its own elements of these to each of the others that need them.
        """
        gathered, messages = [], []
        for matrix in self.cut:
            whole = update.new_empty(matrix.numel)
            here = matrix.within(self.size)
            own = whole[here.start - matrix.start : here.stop - matrix.start]
            own.copy_(update[here])
            for peer, part in self._elsewhere(matrix):
                messages.append(dist.P2POp(dist.isend, own, peer, self._group))
                messages.append(dist.P2POp(dist.irecv, whole[part], peer, self._group))
            gathered.append(whole.view(matrix.rows, matrix.columns))
        if messages:
            for message in dist.batch_isend_irecv(messages):
                message.wait()
        return gathered

    def _add_cut(self, stack: Matrices, index: int) -> None:
        matrix = stack._replace(start=stack.start + index * stack.numel, num_matrices=1)
        here = matrix.within(self.size)
        if here.start < here.stop:
            self.cut.append(matrix)

    def _elsewhere(self, matrix: Matrices) -> Iterable[tuple[int, slice]]:
        """The other ranks (by global number) that have a part of the matrix, and which part."""
        assert self._group is not None, "a part that is all there is cuts nothing"
        own = dist.get_rank(self._group)
        for distance in range(matrix.start // self.size, (matrix.stop - 1) // self.size + 1):
            if distance == 0:
                continue
            begin, end = distance * self.size, (distance + 1) * self.size
            part = slice(max(begin - matrix.start, 0), min(end, matrix.stop) - matrix.start)
            yield dist.get_global_rank(self._group, own + distance), part


def matrices_of(parameter: Tensor, *, start: int = 0) -> Matrices:
    """The matrices of a parameter: one, or a stack of them."""
    rows, columns = parameter.shape[-2:]
    return Matrices(start, parameter.numel() // (rows * columns), rows, columns)


def all_of(parameter: Tensor) -> MatrixParts:
    """The matrices of a parameter that is whole."""
    return MatrixParts([matrices_of(parameter)], size=parameter.numel())
