"""`moeless pack`: split a checkpoint into expert functions. docs/packages.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeless.cli._console import PackingProgress, stdout
from moeless.cli._extras import require_extra


def pack_command(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint (safetensors).")],
    out: Annotated[Path, typer.Argument(help="Folder to make; it must not exist, or hold a pack of this checkpoint.")],
) -> None:
    """Split a checkpoint into its backbone and one package for each expert function."""
    require_extra("serve", "moeless pack")
    from moeless.packages.pack import pack_checkpoint

    with PackingProgress() as on_progress:
        manifest = pack_checkpoint(checkpoint, out, on_progress=on_progress)
    stdout.print(
        f"{out}: {manifest.model_id}, {manifest.num_moe_layers} MoE layers x {manifest.num_experts} experts, "
        f"{len(manifest.functions)} functions of {manifest.function_bytes / 1e6:.1f} MB in all"
    )
