"""Extras of the distribution: a command checks at its beginning that what it needs is installed."""

from __future__ import annotations

from importlib.util import find_spec

from moeless.core.errors import MoelessError

MODULES = {
    "plan": ("numba", "safetensors", "scipy", "sklearn", "threadpoolctl"),
    "serve": (
        "fastapi",
        "filelock",
        "huggingface_hub",
        "jinja2",
        "prometheus_client",
        "psutil",
        "zmq",
        "ray",
        "starlette",
        "tokenizers",
        "torch",
        "transformers",
        "uvicorn",
    ),
    "plot": ("matplotlib",),
}
"""Extra to the modules that it brings, in the order of pyproject.toml, which has the distributions."""


class MissingExtraError(MoelessError):
    """A command needs an extra that is not installed."""

    exit_code = 2


def require_extra(extra: str, needed_by: str) -> None:
    """Raise MissingExtraError, one line with what to install, unless every module of the extra is installed."""
    modules = MODULES["plan"] + MODULES["serve"] if extra == "serve" else MODULES[extra]
    missing = [module for module in modules if not _is_installed(module)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtraError(
            f"{needed_by} needs {', '.join(missing)}, which {verb} not installed: pip install 'moeless[{extra}]'"
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
