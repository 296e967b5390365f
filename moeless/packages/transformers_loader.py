"""The few places where packing and loading reach into transformers' own loader.

`from_pretrained` can neither load a part of a model nor leave a part of it on the meta device, so its steps are
called one by one: find the class, build on meta, convert and set tensors, finalize. Written for transformers 5.19.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.auto_factory import _get_model_class
from transformers.utils import logging as transformers_logging
from transformers.utils.generic import ContextManagers
from transformers.utils.loading_report import LoadStateDictInfo

from moeless.core.errors import UnsupportedFamilyError


def causal_lm_class(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and config that `AutoModelForCausalLM` would build for `config`.

    Raises:
        UnsupportedFamilyError: transformers has no causal language model for it.

    """
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise UnsupportedFamilyError(
            f"family {config.model_type!r} is not supported: transformers has no causal language model for it"
        )
    model_class: type[PreTrainedModel] = _get_model_class(config, mapping)
    text_config_class = config.sub_configs.get("text_config")
    if text_config_class is not None and model_class.config_class == text_config_class:
        config = config.get_text_config()
    return model_class, config


def build_on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model in eval mode without a byte of weights: every parameter and buffer on the meta device."""
    with ContextManagers(model_class.get_init_context(dtype, False, False, None)):
        model: PreTrainedModel = model_class(copy.deepcopy(config))
    model.train(False)
    return model


class TensorLoader:
    """Sets tensors of a state dict on a meta model, a part at a time, as `from_pretrained` would set them all.

    Tensors may be lazy (safetensors slices). With `convert`, hub names and per-expert tensors become in-memory
    names and stacked parameters; without, names must be those of the model.
    """

    def __init__(
        self, model: PreTrainedModel, dtype: torch.dtype, *, device: torch.device | str, convert: bool
    ) -> None:
        self._model = model
        self._mapping: list[Any] = list(get_model_conversion_mapping(model)) if convert else []
        for entry in self._mapping:
            if isinstance(entry, WeightConverter):
                entry.force_cpu = False  # everything is on `device`; "cpu" would not take a dry run's meta tensors
        self._load_config = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=self._mapping,
        )

    def load(self, state_dict: Mapping[str, Any]) -> LoadStateDictInfo:
        """Convert and set `state_dict`; what it lacks stays as it is and is reported as missing."""
        info: LoadStateDictInfo
        with _progress_bar_disabled():
            info, _ = convert_and_load_state_dict_in_model(
                model=self._model, state_dict=dict(state_dict), load_config=self._load_config, disk_offload_index=None
            )
        return info

    def finalize(self, info: LoadStateDictInfo) -> LoadStateDictInfo:
        """Tie weights and compute buffers that no checkpoint holds; drop from `info` what may be missing."""
        finalized: LoadStateDictInfo = self._model._finalize_model_loading(self._model, self._load_config, info)
        return finalized

    def group_by_target(self, names: list[str]) -> dict[str, list[str]]:
        """In-memory name → the names of the state dict that make it.

        A converter with several targets is listed under its first. The order is the loader's own, on which some
        renamings depend.
        """
        targets = self._model.state_dict()
        prefix = self._model.base_model_prefix
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        groups: dict[str, list[str]] = {}
        for name in sorted(names, key=dot_natural_key):
            target, _ = rename_source_key(name, renamings, converters, prefix, targets)
            if target not in targets and name in targets:
                target, _ = rename_source_key(name, [], [], prefix, targets)
            groups.setdefault(target, []).append(name)
        return groups


@contextmanager
def _progress_bar_disabled() -> Iterator[None]:
    """Hide the loading bar: transformers draws a bar per load, and one MoE layer is one load here."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
