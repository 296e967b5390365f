"""Gives each sequence of a batch its own rotary factors, where they depend on the sequence's length.

transformers picks the factors of LongRoPE and of dynamic NTK from the highest position of a forward pass, so that a
short sequence beside a long one would get the long one's, and a prompt in chunks those of each chunk. Here every
sequence gets the factors that the model uses for it alone: those of all its tokens known so far. Where a new token
changes them, what the cache holds of the sequence was rotated by other factors, and the engines compute it anew.

Which models are concerned is found out by calling their rotary modules, not by the names of rope types: PhiMoE scales
by length under every one of them.

Shapes: B rows of a batch, W positions of a row.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeless.core.errors import ConfigError
from moeless.packages.context_length import context_length

_DEFAULT_MAX_LENGTH = 1 << 20
"""Lengths to look at in a model whose config sets no limit."""


class SequenceRotary:
    """The rotary modules of a model, as one function from a sequence's length to its factors."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises: ConfigError if the factors of a model that scales by length cannot be found out."""
        self._modules = _rotary_modules(model)
        self._kinds = sorted({kind for module in self._modules for _, kind in _layer_kinds(module) if kind})
        self._groups: list[tuple[int, Tensor | None]] | None = None
        self._base_length, self._is_stepless = self._find_change(context_length(model.config) or _DEFAULT_MAX_LENGTH)

    @property
    def depends_on_length(self) -> bool:
        """True if sequences of different lengths that the model takes have different factors."""
        return self._base_length is not None

    @property
    def base_length(self) -> int | None:
        """Maximum length with the factors of the shortest sequence; None where every length has them."""
        return self._base_length

    @property
    def changes_with_every_token(self) -> bool:
        """True if beyond `base_length` each length has factors of its own, as in dynamic NTK."""
        return self._is_stepless

    @property
    def kinds(self) -> str:
        """The rope types of the model."""
        return ", ".join(self._kinds)

    def factors_of(self, length: int) -> int:
        """A number that is equal for lengths with equal factors; 0 for those of short sequences."""
        if self._base_length is None or length <= self._base_length:
            return 0
        return length if self._is_stepless else 1

    def changes_at(self, length: int) -> bool:
        """True if a sequence has other factors from its token number `length` on."""
        return self.factors_of(length) != self.factors_of(length - 1)

    def install(self) -> None:
        """Let `lengths` decide the factors from now on. Without effect on a model that does not depend on lengths."""
        if self.depends_on_length:
            for module in self._modules:
                module.forward = self._forward_of(module, module.forward)

    def remove(self) -> None:
        """Give the modules back to transformers."""
        for module in self._modules:
            module.__dict__.pop("forward", None)
            reset(module)

    @contextmanager
    def lengths(self, find: Callable[[], NDArray[np.int64]], device: torch.device) -> Iterator[None]:
        """Wrap one forward pass. Outside of it, a pass gets the factors of its highest position, as a new model's does.

        Args:
            find: returns for each position of the pass the length of its sequence, (B, W) or what broadcasts to it;
                called only if the model depends on lengths.
        """
        if not self.depends_on_length:
            yield
            return
        self._groups = self._group(find(), device)
        try:
            yield
        finally:
            self._groups = None

    def _group(self, lengths_BW: NDArray[np.int64], device: torch.device) -> list[tuple[int, Tensor | None]]:
        """For each distinct set of factors, a length that has them and the positions that need them."""
        distinct, where = np.unique(lengths_BW, return_inverse=True)
        factors = [self.factors_of(length) for length in distinct.tolist()]
        representatives = dict(zip(factors, distinct.tolist(), strict=True))  # the longest of each set
        if len(representatives) == 1:
            return [(length, None) for length in representatives.values()]
        factors_BW = np.array(factors)[where.reshape(lengths_BW.shape)]
        return [
            (length, torch.from_numpy(factors_BW == factors).to(device)) for factors, length in representatives.items()
        ]

    def _forward_of(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(forward)

        def forward_by_sequence(*args: Any, **kwargs: Any) -> Any:
            if self._groups is None:
                reset(module)
                return forward(*args, **kwargs)
            arguments = signature.bind(*args, **kwargs).arguments
            position_ids = arguments.pop("position_ids")
            result: tuple[Tensor, ...] = ()
            is_tuple = True
            for length, mask_BW in self._groups:
                found = _forward_alone(module, forward, arguments, position_ids, length)
                is_tuple = isinstance(found, tuple)
                parts = found if is_tuple else (found,)
                if result and mask_BW is not None:
                    parts = tuple(
                        torch.where(mask_BW[..., None], new, old) for new, old in zip(parts, result, strict=True)
                    )
                result = parts
            return result if is_tuple else result[0]

        return forward_by_sequence

    def _find_change(self, max_length: int) -> tuple[int | None, bool]:
        """The longest length with the first factors (None if all have them), and whether all beyond it differ."""
        shortest = 2  # a fingerprint looks at the second position
        first, last = self._fingerprint(shortest), self._fingerprint(max_length)
        if first == last:
            return None, False
        low, high = shortest, max_length  # low has the first factors, high has others
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fingerprint(middle) == first else (low, middle)
        return low, self._fingerprint(high) != last

    @torch.inference_mode()
    def _fingerprint(self, length: int) -> list[bytes]:
        """Return every rotary module's output for the second position of a sequence of `length` tokens."""
        found: list[bytes] = []
        for module in self._modules:
            device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))
            x, position_ids = torch.zeros(1, 1, 1, device=device), torch.ones(1, 1, dtype=torch.int64, device=device)
            for layer_type, kind in _layer_kinds(module):
                arguments = {"x": x} if layer_type is None else {"x": x, "layer_type": layer_type}
                try:
                    output = _forward_alone(module, module.forward, arguments, position_ids, length)
                except Exception as error:
                    if _is_by_length(kind):
                        raise ConfigError(
                            f"rope_type {kind!r} of {type(module).__name__} cannot be computed for one sequence of a "
                            f"batch: {type(error).__name__}: {error}"
                        ) from error
                    continue
                parts = output if isinstance(output, tuple) else (output,)
                found += [part.cpu().numpy().tobytes() for part in parts]
            reset(module)
        return found


def reset(module: nn.Module) -> None:
    """Undo what transformers keeps of earlier forward passes: the factors of a rotary module become a new model's."""
    if not any(_is_by_length(kind) for _, kind in _layer_kinds(module)):
        return
    for name, tensor in list(module.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            module.register_buffer(name.removesuffix("original_inv_freq") + "inv_freq", tensor, persistent=False)
    for name in list(module.__dict__):
        if name.endswith("max_seq_len_cached"):
            setattr(module, name, module.original_max_seq_len)
        elif name.endswith("long_inv_freq"):
            delattr(module, name)


def reset_factors(model: PreTrainedModel) -> None:
    """`reset` every rotary module of a model."""
    for module in _rotary_modules(model):
        reset(module)


@contextmanager
def changing_at(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Let rotary factors change beyond `length` tokens, so that a check can cross the boundary with short prompts."""
    modules = _rotary_modules(model)
    before = [dict(module.__dict__) for module in modules]
    try:
        for module in modules:
            _change_at(module, length)
            reset(module)
        yield
    finally:
        for module, attributes in zip(modules, before, strict=True):
            module.__dict__.update({name: attributes[name] for name in ("config", *_LENGTHS) if name in attributes})
            reset(module)


_LENGTHS = ("original_max_seq_len", "max_seq_len_cached")


def _change_at(module: nn.Module, length: int) -> None:
    config: Any = copy.copy(module.config)
    config.rope_parameters = copy.deepcopy(config.rope_parameters)
    config.max_position_embeddings = length
    for parameters in (config.rope_parameters, *config.rope_parameters.values()):
        if isinstance(parameters, dict) and "original_max_position_embeddings" in parameters:
            parameters["original_max_position_embeddings"] = length
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = length
    module.config = config
    for name in _LENGTHS:
        if hasattr(module, name):
            setattr(module, name, length)


def _forward_alone(
    module: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any], position_ids: Tensor, length: int
) -> Any:
    """Return a new model's output for `position_ids` of a sequence of `length` tokens; higher ones get the last's."""
    reset(module)
    last = position_ids.new_full((*position_ids.shape[:-1], 1), length - 1)
    output = forward(**arguments, position_ids=torch.cat([position_ids.clamp(max=length - 1), last], dim=-1))
    if not isinstance(output, tuple):
        return output[..., :-1, :]
    return tuple(part[..., :-1, :] for part in output)


def _rotary_modules(model: PreTrainedModel) -> list[Any]:
    return [
        module
        for module in model.modules()
        if hasattr(module, "rope_type")
        and hasattr(module, "config")
        and {"x", "position_ids"} <= set(inspect.signature(type(module).forward).parameters)
    ]


def _is_by_length(kind: str) -> bool:
    """True for the rope types whose factors transformers changes while it runs."""
    return kind == "longrope" or "dynamic" in kind


def _layer_kinds(module: Any) -> list[tuple[str | None, str]]:
    """The layer types that the module knows, None if it makes no difference between them, and their rope types."""
    if isinstance(module.rope_type, dict):
        return [(layer_type, str(kind or "")) for layer_type, kind in module.rope_type.items()]
    return [(None, str(module.rope_type or ""))]
