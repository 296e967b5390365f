"""The model that comes with the package."""

from __future__ import annotations

from pathlib import Path

BUNDLED_MODEL = "moeless-mini"


def bundled_model_path() -> Path:
    """Folder of the bundled checkpoint."""
    return Path(__file__).parent / BUNDLED_MODEL
