"""A deployment whose class is imported in the replica only.

Ray ships a deployment's class by reference, so the process that deploys it must import its module. With this one in
between, the process that deploys loads neither transformers nor the engine: seconds on a small machine.
"""

from __future__ import annotations

import importlib
from typing import Any


class DeferredReplica:
    """Stands for an instance of `import_path` ("module:Class"), made with the other arguments."""

    def __init__(self, import_path: str, *arguments: Any) -> None:
        module_name, _, class_name = import_path.partition(":")
        self._replica: Any = getattr(importlib.import_module(module_name), class_name)(*arguments)

    def __call__(self, *arguments: Any) -> Any:
        return self._replica(*arguments)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._replica, name)

    def check_health(self) -> None:
        """Asked by Serve."""
        if hasattr(self._replica, "check_health"):
            self._replica.check_health()

    def __del__(self) -> None:
        """Called by Serve when the replica stops, and once more by Python."""
        replica = self.__dict__.pop("_replica", None)
        if hasattr(replica, "close"):
            replica.close()
