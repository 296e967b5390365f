"""Checks of CUDA memory without a GPU: its absence is an error that connect can act on."""

from __future__ import annotations

import pytest
import torch

from moeless.core.errors import TransportError
from moeless.dispatch import cuda_memory
from moeless.dispatch.cuda_memory import CudaMemory


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_machine_without_a_gpu_has_no_cuda_memory() -> None:
    with pytest.raises(TransportError, match="CUDA cannot be used"):
        CudaMemory(torch.device("cuda:0"))


def test_a_runtime_error_is_told_in_its_own_words() -> None:
    class Library:
        """A CUDA runtime that has no memory left."""

        cudaMalloc = staticmethod(lambda *arguments: 2)
        cudaGetLastError = staticmethod(lambda: 2)

        class cudaGetErrorString:  # noqa: N801
            def __new__(cls, code: int) -> bytes:
                return b"out of memory"

    with pytest.raises(TransportError, match="^cudaMalloc failed: out of memory$"):
        cuda_memory._Runtime(Library()).call("cudaMalloc", 1)


@pytest.mark.parametrize(
    ("handle", "message"), [("xyz", "must be hexadecimal, got 'xyz'"), ("abcd", "must have 64 bytes, got 2")]
)
def test_a_handle_that_is_none_is_refused(handle: str, message: str) -> None:
    with pytest.raises(TransportError, match=message):
        cuda_memory._decode(handle, 64)
