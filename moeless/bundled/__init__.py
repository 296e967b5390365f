"""The model that comes with the package: a very small mixture of experts, for demonstrations and tests.

Read by the engine and the command line when no other model is named. Nothing heavy is imported here.
"""

from __future__ import annotations

from pathlib import Path

BUNDLED_MODEL_NAME = "moeless-mini"


def bundled_model_path() -> Path:
    """The folder of `moeless-mini`, in the layout of a Hugging Face checkpoint."""
    return Path(__file__).parent / BUNDLED_MODEL_NAME
