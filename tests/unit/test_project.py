"""The promises of the project's frame: what is shipped, what is declared, and which way imports go."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

import moeless
import moeless_operators
import moeless_predictors

ROOT = Path(__file__).parents[2]
SOURCES = {
    "moeless": ROOT / "moeless",
    "moeless_predictors": ROOT / "predictors" / "moeless_predictors",
    "moeless_operators": ROOT / "operators" / "moeless_operators",
}


def test_the_three_packages_carry_the_version_of_the_distribution() -> None:
    version = metadata.version("moeless")
    assert moeless.__version__ == version
    assert moeless_predictors.__version__ == version
    assert moeless_operators.__version__ == version


@pytest.mark.parametrize(
    "part",
    [
        "moeless.cli",
        "moeless.core",
        "moeless.engine.protocol",
        "moeless.gateway",
        "moeless_predictors",
        "moeless_operators",
    ],
)
def test_a_light_part_starts_without_torch_ray_and_transformers(part: str) -> None:
    program = f"""
import importlib, pkgutil, sys
part = importlib.import_module({part!r})
for module in pkgutil.walk_packages(getattr(part, "__path__", []), part.__name__ + "."):
    if module.name != "moeless_predictors.gate":  # the one that needs torch
        importlib.import_module(module.name)
print(*sorted({{"torch", "ray", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_imports_go_one_way() -> None:
    lint_imports = Path(sysconfig.get_path("scripts")) / "lint-imports"
    done = subprocess.run(
        [lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout


def test_every_library_that_the_source_imports_is_declared() -> None:
    providers = metadata.packages_distributions()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {_normal(Requirement(line).name) for line in itertools.chain.from_iterable(lines)}
    undeclared = {
        f"{path.relative_to(ROOT)}: {library}"
        for folder in SOURCES.values()
        for path in folder.rglob("*.py")
        for library in _libraries(path)
        if declared.isdisjoint(_normal(name) for name in providers.get(library, [library]))
    }
    assert undeclared == set()


def test_the_wheel_holds_the_three_packages_and_every_data_file() -> None:
    shipped = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    expected = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in SOURCES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= shipped
    assert {path.split("/")[0] for path in shipped} == set(SOURCES)


def _libraries(path: Path) -> set[str]:
    """Names of the third-party packages that a file imports, wherever in it."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            imported.add(node.module)
    return {name.split(".")[0] for name in imported} - sys.stdlib_module_names - set(SOURCES)


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")
