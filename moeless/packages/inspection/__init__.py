"""Check a checkpoint's config, tokenizer, index and headers before torch is imported.

Called by pack.pack_checkpoint. Reads megabytes at most, so that a broken or hostile folder is refused in a second
or two and costs little memory. Nothing here imports torch; values of tensors are checked while packing.
"""

from __future__ import annotations

from pathlib import Path

from moeless.core.errors import CheckpointError
from moeless.packages.inspection.companions import check_companions
from moeless.packages.inspection.config import check_config, check_model_type, check_quantization
from moeless.packages.inspection.files import read_json, require_inside, weight_files
from moeless.packages.inspection.headers import read_headers
from moeless.packages.inspection.sizes import check_sizes

__all__ = ["inspect_checkpoint", "weight_files"]


def inspect_checkpoint(path: Path) -> tuple[Path, ...]:
    """Refuse a folder that cannot be packed, by what stands in its files beside the tensors' values.

    Returns: the safetensors files.
    Raises: CheckpointError with file, field, rule and value, in one line.
    """
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path}: no such folder")
    require_inside(path, path / "config.json")
    config = read_json(path / "config.json")
    check_model_type(path, config)
    check_quantization(path, config)
    check_config(path / "config.json", config)
    files = weight_files(path)
    check_sizes(path / "config.json", config, read_headers(files))
    check_companions(path, config)
    return files
