"""Memory for one layer's instances: stacked weights with a row for each instance.

Stacking lets many instances run as one grouped matrix product. On the CPU a row is reserved for every expert of
the layer but costs memory only once it is written, and gives it back when it is released; there row and expert
number are the same. On a GPU the arena has as many rows as its budget buys.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys

import torch

from moeless.core.expert import ExpertLayout
from moeless.functions.staging import Copy, Staging
from moeless.packages.weights import FunctionWeights

_HUGE_PAGE_BYTES = 2 << 20
_MADV_COLLAPSE = 25
"""Makes one huge page of what is there now (Linux 6.1); Python has no name for it yet."""


def row_bytes(layout: ExpertLayout, dtype: torch.dtype) -> int:
    """Bytes that an instance of this layout holds in `dtype`."""
    return sum(math.prod(shape) for shape in _row_shapes(layout).values()) * dtype.itemsize


def _row_shapes(layout: ExpertLayout) -> dict[str, tuple[int, ...]]:
    hidden, inner = layout.hidden_size, layout.intermediate_size
    up_out = 2 * inner if layout.has_gate else inner
    shapes: dict[str, tuple[int, ...]] = {"up": (up_out, hidden), "down": (hidden, inner)}
    if layout.is_transposed:
        shapes = {"up": (hidden, up_out), "down": (inner, hidden)}
    if layout.has_bias:
        shapes |= {"up_bias": (up_out,), "down_bias": (hidden,)}
    return shapes


class LayerArena:
    """Stacked weights of one layer: up (S, ...), down (S, ...) and biases, S rows.

    `up_SHI` and `down_SIH` are views oriented (in, out) whatever the family stores, as grouped_mm takes them.

    Args:
        staging: what copies to a GPU; None on the CPU.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        *,
        num_rows: int,
        dtype: torch.dtype,
        device: torch.device,
        staging: Staging | None = None,
    ) -> None:
        self._staging = staging
        self.num_rows = num_rows
        self.row_bytes = row_bytes(layout, dtype)
        self._blocks = {
            name: _Block(num_rows, shape, dtype, device, lazy=device.type == "cpu")
            for name, shape in _row_shapes(layout).items()
        }
        up_S, down_S = self._blocks["up"].tensor, self._blocks["down"].tensor
        self.up_SHI = up_S if layout.is_transposed else up_S.transpose(1, 2)
        self.down_SIH = down_S if layout.is_transposed else down_S.transpose(1, 2)
        self.up_bias_SI = self._blocks["up_bias"].tensor if layout.has_bias else None
        self.down_bias_SH = self._blocks["down_bias"].tensor if layout.has_bias else None

    @torch.inference_mode()  # the arena may have been made in it, and only there such tensors can be written to
    def write(self, row: int, weights: FunctionWeights) -> None:
        """Copy a function's weights into `row`, converting dtype and device; returns when they are there."""
        copies = []
        for name, block in self._blocks.items():
            tensor = getattr(weights, name)
            if tensor is None or tensor.shape != block.tensor.shape[1:]:
                got = None if tensor is None else tuple(tensor.shape)
                raise ValueError(f"{name} must have shape {tuple(block.tensor.shape[1:])}, got {got}")
            block.prepare(row)
            copies.append(Copy(block.tensor[row], tensor))
        if self._staging is not None:
            self._staging.copy(copies)
            return
        for copy in copies:
            copy.target.copy_(copy.source)
        for block in self._blocks.values():
            block.join_neighbours(row)

    def release(self, row: int) -> None:
        """Give the row's memory back to the system (CPU); on a GPU the row stays reserved for the next instance."""
        for block in self._blocks.values():
            block.release(row)


class _Block:
    """One stacked parameter. On the CPU it lies in an anonymous mapping, so that untouched rows take no memory."""

    def __init__(
        self, num_rows: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, lazy: bool
    ) -> None:
        self._mapping: mmap.mmap | None = None
        self._row_bytes = math.prod(shape) * dtype.itemsize
        self._written = [False] * num_rows
        if lazy:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
            self._mapping = mmap.mmap(-1, max(1, num_rows * self._row_bytes), flags=flags)
            flat = torch.frombuffer(self._mapping, dtype=dtype, count=num_rows * math.prod(shape))
            self.tensor = flat.view(num_rows, *shape)
        else:
            self.tensor = torch.empty((num_rows, *shape), dtype=dtype, device=device)

    def prepare(self, row: int) -> None:
        """Before a row is written: huge pages for what lies wholly inside it.

        They make grouped products a tenth faster; but one across the border of two rows would hold memory of a
        neighbour that holds nothing.
        """
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self._advise(row, mmap.MADV_HUGEPAGE, _HUGE_PAGE_BYTES)

    def join_neighbours(self, row: int) -> None:
        """After a row was written: huge pages across its borders too, where all of the neighbours hold something."""
        self._written[row] = True
        if self._mapping is None or sys.platform != "linux":
            return
        address, size = self.tensor.data_ptr(), self._row_bytes
        first = (address + row * size) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES - address
        for start in range(first, (row + 1) * size, _HUGE_PAGE_BYTES):
            end = start + _HUGE_PAGE_BYTES
            if 0 <= start and end <= len(self._mapping) and all(self._written[start // size : -(-end // size)]):
                with contextlib.suppress(OSError):  # a kernel without it, or no free huge page
                    self._mapping.madvise(_MADV_COLLAPSE, start, _HUGE_PAGE_BYTES)

    def release(self, row: int) -> None:
        """Give the row's pages back; those that it shares with a neighbour stay."""
        self._written[row] = False
        self._advise(row, mmap.MADV_DONTNEED, mmap.PAGESIZE)

    def _advise(self, row: int, advice: int, grain: int) -> None:
        """Tell the system about the whole pages of size `grain` inside the row."""
        if self._mapping is None:
            return
        address = self.tensor.data_ptr()
        start = -(-(address + row * self._row_bytes) // grain) * grain - address
        end = (address + (row + 1) * self._row_bytes) // grain * grain - address
        if end > start:
            self._mapping.madvise(advice, start, end - start)
