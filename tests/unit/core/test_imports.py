"""Processes of the operator's kind stay small: core and its policies load nothing that computes."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("numba", "sklearn", "scipy", "torch", "transformers", "ray", "moeless_predictors")


def loaded_by(*statements: str) -> set[str]:
    """Heavy modules, and modules of moeless beside core, that a fresh process has loaded."""
    program = "\n".join([*statements, "import sys", "print(*sys.modules)"])
    names = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    ours = {name for name in names if name.startswith("moeless.") and not name.startswith("moeless.core")}
    return ours | (set(HEAVY) & set(names))


def test_the_operators_imports_load_nothing_that_computes() -> None:
    assert loaded_by("import moeless_operators", "import moeless.core.policy", "import moeless.core.errors") == set()


def test_no_module_of_core_loads_anything_else_of_ours() -> None:
    walk = (
        "import pkgutil, importlib, moeless.core",
        "names = [found.name for found in pkgutil.walk_packages(moeless.core.__path__, 'moeless.core.')]",
        "[importlib.import_module(name) for name in names]",
    )
    assert loaded_by(*walk) == set()


@pytest.mark.parametrize("statement", ["import scipy", "import moeless.planning.cost"])
def test_the_check_sees_what_it_looks_for(statement: str) -> None:
    assert loaded_by(statement)
