"""The weights of one expert function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class FunctionWeights:
    """One expert's tensors, oriented as in the family's stacked parameter (see core.expert.ExpertLayout)."""

    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that this function has, under the names they bear in its package."""
        for name in ("up", "down", "up_bias", "down_bias"):
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors, wherever they are (a memory map counts in full)."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.named_tensors())
