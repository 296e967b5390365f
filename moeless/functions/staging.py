"""Copies weights to a GPU at the speed of its bus.

A package is a memory map of a file, which the GPU cannot read; the driver's own detour for such memory uses one
thread and one small buffer. Here several threads fill pinned buffers while the ones before are on their way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
import torch

_MIN_CHUNK_BYTES, _MAX_CHUNK_BYTES = 256 << 10, 4 << 20
"""Large enough that the interpreter's part does not show, small enough that a small expert keeps every thread busy."""
_MAX_THREADS = 8
"""A core copies some 10 GB/s, PCIe 5 takes 55."""


class Copy(NamedTuple):
    """One tensor to copy into memory of the same shape; the dtypes may differ."""

    target: torch.Tensor
    """Contiguous, on the device."""
    source: torch.Tensor
    """On the CPU."""


class Staging:
    """Pinned buffers and threads for one device. May be used from several threads, one after the other.

    Args:
        device: a GPU; the CPU, for tests, goes the same way without what only a GPU has.
        num_threads, chunk_bytes: twice their product is pinned once something is copied.
    """

    def __init__(
        self, device: torch.device, *, num_threads: int | None = None, chunk_bytes: int = _MAX_CHUNK_BYTES
    ) -> None:
        self._device = device
        self._num_threads = num_threads or min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        self._chunk_bytes = chunk_bytes
        self._lanes: list[_Lane] = []
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="staging")
        self._lock = threading.Lock()

    def copy(self, copies: Iterable[Copy]) -> None:
        """Copy all; returns when they are there. What was enqueued on the device before may still read the targets."""
        with self._lock:
            if not self._lanes:
                self._lanes = [_Lane(self._device, self._chunk_bytes) for _ in range(self._num_threads)]
            late: list[Copy] = []
            whole: list[Copy] = []
            for copy in copies:
                target = copy.target
                if copy.source.dtype != target.dtype:  # converted on the device, which is faster at it
                    target = torch.empty(target.shape, dtype=copy.source.dtype, device=self._device)
                    late.append(Copy(copy.target, target))
                whole.append(Copy(target.view(-1).view(torch.uint8), _bytes_of(copy.source)))
            self._run(self._split(whole))
            for copy in late:
                copy.target.copy_(copy.source)
            if late and self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()

    def _split(self, copies: list[Copy]) -> list[Copy]:
        """Into chunks, as many as there are threads where that does not make them too small."""
        fair = sum(len(copy.source) for copy in copies) // self._num_threads
        size = min(self._chunk_bytes, max(_MIN_CHUNK_BYTES, fair))
        return [
            Copy(target[start : start + size], source[start : start + size])
            for target, source in copies
            for start in range(0, len(source), size)
        ]

    def _run(self, chunks: list[Copy]) -> None:
        lanes = self._lanes[: len(chunks)]
        for lane in lanes:
            lane.follow_device()
        running = [self._threads.submit(lane.copy, chunks[index :: len(lanes)]) for index, lane in enumerate(lanes)]
        wait(running)
        for done in running:
            done.result()


class _Lane:
    """One thread's buffers: one is filled while the other is on its way."""

    def __init__(self, device: torch.device, chunk_bytes: int) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self._buffers = [torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._sent = [torch.cuda.Event() for _ in range(2)] if on_gpu else []

    def follow_device(self) -> None:
        """Begin behind what the device was given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.default_stream(self._device))

    @torch.inference_mode()
    def copy(self, chunks: Sequence[Copy]) -> None:
        for index, chunk in enumerate(chunks):
            turn = index % 2
            buffer = self._buffers[turn][: len(chunk.source)]
            if self._stream is None:
                _fill(buffer, chunk.source)
                chunk.target.copy_(buffer)
                continue
            self._sent[turn].synchronize()  # at once, if it was never recorded
            _fill(buffer, chunk.source)
            with torch.cuda.stream(self._stream):
                chunk.target.copy_(buffer, non_blocking=True)
                self._sent[turn].record(self._stream)
        if self._stream is not None:
            self._stream.synchronize()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _fill(buffer: torch.Tensor, source: torch.Tensor) -> None:
    """By numpy, which stays in this thread and lets others run; torch would wake a pool of its own for each."""
    np.copyto(buffer.numpy(), source.numpy())
