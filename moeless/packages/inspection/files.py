"""Read a checkpoint's small files, and only those that lie in its folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from moeless.core.errors import CheckpointError
from moeless.packages.files import lies_inside

SAFE_WEIGHTS_NAME = "model.safetensors"
SAFE_WEIGHTS_INDEX_NAME = "model.safetensors.index.json"

MAX_CONFIG_BYTES = 16 << 20
"""A config, generation config or tokenizer config; those of published models are below 1 MB."""
MAX_INDEX_BYTES = 64 << 20
"""An index; 200,000 tensors take 25 MB."""
MAX_TOKENIZER_BYTES = 128 << 20
"""A tokenizer.json; vocabularies of 260,000 tokens take 35 MB."""
MAX_WEIGHT_FILES = 10_000
_WEIGHTS_OF_OTHERS = (".bin", ".pt", ".pth", ".gguf")


def read_json(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError if it is missing, too large, not JSON or no object."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(f"{path}: must have at most {max_bytes} bytes, has {size}")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); is this a checkpoint?") from error
    except RecursionError:
        raise CheckpointError(f"{path}: must not be nested as deeply as it is") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def require_inside(folder: Path, file: Path) -> None:
    """Refuse a file that a link leads out of `folder`, but for the links of the Hugging Face cache.

    There a snapshot's files are links to `blobs` of the same repository.
    """
    if lies_inside(folder, file):
        return
    target = Path(os.path.realpath(file))
    root = Path(os.path.realpath(folder))
    if root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs":
        return
    raise CheckpointError(f"{file}: must lie inside {folder}, but is a link to {target}")


def weight_files(path: Path) -> tuple[Path, ...]:
    """The safetensors files of the checkpoint, each inside its folder. Raises CheckpointError."""
    single = path / SAFE_WEIGHTS_NAME
    if single.is_file():
        require_inside(path, single)
        return (single,)
    index = path / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        others = sorted(file.name for file in path.iterdir() if file.suffix in _WEIGHTS_OF_OTHERS)
        found = f", only {others[0]}" if others else ""
        raise CheckpointError(f"checkpoint {path} has no {SAFE_WEIGHTS_NAME}{found}; moeless reads safetensors only")
    require_inside(path, index)
    files = tuple(path / name for name in _file_names(index))
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} lacks {file.name}, which its index names")
        require_inside(path, file)
    return files


def _file_names(index: Path) -> list[str]:
    weight_map = read_json(index, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: weight_map must be an object, got {type(weight_map).__name__}")
    if not weight_map:
        raise CheckpointError(f"{index}: weight_map must name at least one tensor, got none")
    for tensor, name in weight_map.items():
        field = f"{index}: weight_map[{tensor!r:.100}]"
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{field} must name a .safetensors file, got {name!r:.60}")
        if name != os.path.basename(name) or "\\" in name or not name.isprintable():
            raise CheckpointError(f"{field} must name a file of the same folder, got {name!r:.60}")
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_WEIGHT_FILES:
        raise CheckpointError(f"{index}: weight_map must name at most {MAX_WEIGHT_FILES} files, got {len(names)}")
    return names
