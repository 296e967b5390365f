"""Find the packed model behind a name: the bundled one, a folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from moeless.bundled import BUNDLED_MODEL_NAME, bundled_model_path
from moeless.core.errors import CheckpointError
from moeless.packages.cache import packed_dir
from moeless.packages.manifest import MANIFEST_NAME
from moeless.packages.pack import pack_checkpoint

if TYPE_CHECKING:
    from moeless.packages.files import ProgressCallback
    from moeless.packages.packed_model import PackedModel

_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
_HUB_SKIPPED = ["*/*", "consolidated*"]
"""Copies in other formats that some repositories hold beside the one that transformers reads."""


def resolve_model(name: str, *, on_progress: ProgressCallback | None = None) -> PackedModel:
    """Open the packed model that `name` stands for, packing it into the cache first where needed.

    `name` is `moeless-mini`, a packed folder, a checkpoint folder, or a hub name such as `allenai/OLMoE-1B-7B-0924`.
    A folder wins over a hub name. Two processes that ask for the same checkpoint pack it once.

    Raises:
        CheckpointError: nothing of that name, or it cannot be packed.
        PackageError: a packed folder that is damaged.

    """
    folder = Path(name).expanduser()
    if not (name and (folder / MANIFEST_NAME).is_file()):
        checkpoint, model_id = locate_checkpoint(name)
        folder = packed_dir(checkpoint)
        if not (folder / MANIFEST_NAME).is_file():
            pack_checkpoint(checkpoint, folder, on_progress=on_progress, model_id=model_id)
    from moeless.packages.packed_model import PackedModel  # imports torch, which a refusal does without

    return PackedModel.open(folder)


def locate_checkpoint(name: str) -> tuple[Path, str]:
    """Folder and model id of the checkpoint that `name` stands for, downloaded first if it is a hub name.

    Raises:
        CheckpointError: nothing of that name.

    """
    if name == BUNDLED_MODEL_NAME:
        return bundled_model_path(), name
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder.resolve(), folder.resolve().name
    if not _HUB_NAME.match(name):
        raise CheckpointError(f"model {name!r}: no such folder, and not a name of the form organization/model")
    return _download(name), name


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIPPED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"model {name!r}: no such folder, and not to be had from the hub ({reason})") from error
