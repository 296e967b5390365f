"""Memory for one layer's instances: stacked weights with a slot for each instance.

Stacking lets many instances run as one grouped matrix product. On the CPU a slot is reserved for every expert of
the layer but costs memory only once it is written, and gives it back when it is released; there slot and expert
number are the same. On a GPU the arena has as many slots as its budget buys.
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


def slot_bytes(layout: ExpertLayout, dtype: torch.dtype) -> int:
    """Bytes that an instance of this layout holds in `dtype`."""
    return sum(math.prod(shape) for shape in _slot_shapes(layout).values()) * dtype.itemsize


def _slot_shapes(layout: ExpertLayout) -> dict[str, tuple[int, ...]]:
    hidden, inner = layout.hidden_size, layout.intermediate_size
    up_out = 2 * inner if layout.has_gate else inner
    shapes: dict[str, tuple[int, ...]] = {"up": (up_out, hidden), "down": (hidden, inner)}
    if layout.is_transposed:
        shapes = {"up": (hidden, up_out), "down": (inner, hidden)}
    if layout.has_bias:
        shapes |= {"up_bias": (up_out,), "down_bias": (hidden,)}
    return shapes


class LayerArena:
    """Stacked weights of one layer: up (S, ...), down (S, ...) and biases, S slots.

    `up_SHI` and `down_SIH` are views oriented (in, out) whatever the family stores, as grouped_mm takes them.

    Args:
        staging: what copies to a GPU; None on the CPU.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        *,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        staging: Staging | None = None,
    ) -> None:
        self._staging = staging
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes(layout, dtype)
        self._blocks = {
            name: _Block(num_slots, shape, dtype, device, lazy=device.type == "cpu")
            for name, shape in _slot_shapes(layout).items()
        }
        up_S, down_S = self._blocks["up"].tensor, self._blocks["down"].tensor
        self.up_SHI = up_S if layout.is_transposed else up_S.transpose(1, 2)
        self.down_SIH = down_S if layout.is_transposed else down_S.transpose(1, 2)
        self.up_bias_SI = self._blocks["up_bias"].tensor if layout.has_bias else None
        self.down_bias_SH = self._blocks["down_bias"].tensor if layout.has_bias else None

    @torch.inference_mode()  # the arena may have been made in it, and only there such tensors can be written to
    def write(self, slot: int, weights: FunctionWeights) -> None:
        """Copy a function's weights into `slot`, converting dtype and device; returns when they are there."""
        copies = []
        for name, block in self._blocks.items():
            tensor = getattr(weights, name)
            if tensor is None or tensor.shape != block.tensor.shape[1:]:
                got = None if tensor is None else tuple(tensor.shape)
                raise ValueError(f"{name} must have shape {tuple(block.tensor.shape[1:])}, got {got}")
            block.prepare(slot)
            copies.append(Copy(block.tensor[slot], tensor))
        if self._staging is not None:
            self._staging.copy(copies)
            return
        for copy in copies:
            copy.target.copy_(copy.source)
        for block in self._blocks.values():
            block.join_neighbours(slot)

    def release(self, slot: int) -> None:
        """Give the slot's memory back to the system (CPU); on a GPU the slot stays reserved for the next instance."""
        for block in self._blocks.values():
            block.release(slot)


class _Block:
    """One stacked parameter. On the CPU it lies in an anonymous mapping, so that untouched slots take no memory."""

    def __init__(
        self, num_slots: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, lazy: bool
    ) -> None:
        self._mapping: mmap.mmap | None = None
        self._slot_bytes = math.prod(shape) * dtype.itemsize
        self._loaded = [False] * num_slots
        if lazy:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
            self._mapping = mmap.mmap(-1, max(1, num_slots * self._slot_bytes), flags=flags)
            flat = torch.frombuffer(self._mapping, dtype=dtype, count=num_slots * math.prod(shape))
            self.tensor = flat.view(num_slots, *shape)
        else:
            self.tensor = torch.empty((num_slots, *shape), dtype=dtype, device=device)

    def prepare(self, slot: int) -> None:
        """Before a slot is written: huge pages for what lies wholly inside it.

        They make grouped products a tenth faster; but one across the border of two slots would hold memory of a
        neighbour that is not loaded.
        """
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self._advise(slot, mmap.MADV_HUGEPAGE, _HUGE_PAGE_BYTES)

    def join_neighbours(self, slot: int) -> None:
        """After a slot was written: huge pages across its borders too, where all of the neighbours are loaded."""
        self._loaded[slot] = True
        if self._mapping is None or sys.platform != "linux":
            return
        address, size = self.tensor.data_ptr(), self._slot_bytes
        first = (address + slot * size) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES - address
        for start in range(first, (slot + 1) * size, _HUGE_PAGE_BYTES):
            end = start + _HUGE_PAGE_BYTES
            if 0 <= start and end <= len(self._mapping) and all(self._loaded[start // size : -(-end // size)]):
                with contextlib.suppress(OSError):  # a kernel without it, or no free huge page
                    self._mapping.madvise(_MADV_COLLAPSE, start, _HUGE_PAGE_BYTES)

    def release(self, slot: int) -> None:
        """Give the slot's pages back; those that it shares with a neighbour stay."""
        self._loaded[slot] = False
        self._advise(slot, mmap.MADV_DONTNEED, mmap.PAGESIZE)

    def _advise(self, slot: int, advice: int, grain: int) -> None:
        """Tell the system about the whole pages of size `grain` inside the slot."""
        if self._mapping is None:
            return
        address = self.tensor.data_ptr()
        start = -(-(address + slot * self._slot_bytes) // grain) * grain - address
        end = (address + (slot + 1) * self._slot_bytes) // grain * grain - address
        if end > start:
            self._mapping.madvise(advice, start, end - start)
