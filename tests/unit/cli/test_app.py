"""The command line as a whole: help at any width, versions, mistakes as one line, extras that are missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from moeless import __version__
from moeless.cli._extras import MODULES
from moeless.cli.app import app

ROOT = Path(__file__).resolve().parents[3]
_DISTRIBUTION_OF_MODULE = {"sklearn": "scikit-learn", "zmq": "pyzmq"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moeless.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | environment,
    )


def commands(group: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found = {}
    for name, command in group.commands.items():
        found |= commands(command, (*path, name)) if hasattr(command, "commands") else {(*path, name): command}
    return found


COMMANDS = commands(typer.main.get_command(app))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_shows_every_option_whole_at_80_columns(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, [*path, "--help"], terminal_width=80).output
    words = shown.replace(",", " ").replace("/", " ").split()
    for param in COMMANDS[path].params:
        for option in (*param.opts, *param.secondary_opts):
            if option.startswith("-") and not param.hidden:
                assert option in words, shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_the_root_help_names_every_command_and_cuts_nothing() -> None:
    shown = run("--help", COLUMNS="80").stdout
    for path in COMMANDS:
        assert f"  {path[0]} " in shown
    assert "..." not in shown.partition("Commands:")[2]
    assert "…" not in shown


@pytest.mark.parametrize("arguments", [("--version",), ("version",)])
def test_the_version_is_printed(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stdout.strip()) == (0, __version__)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("servve",), ("servve", "serve", "moeless --help")),
        (("serve",), ("model", "moeless serve --help")),
        (("serve", "moeless-mini", "--prot", "1"), ("--prot",)),
        (("serve", "moeless-mini", "--port", "many"), ("--port", "many")),
        (("experts", "--top", "-1"), ("--top must be at least 1, got -1",)),
        (("policy", "check", "/nowhere.yaml"), ("FILE must be a file that exists, got /nowhere.yaml",)),
        (("predict", "info", "/"), ("PREDICTORS must be a file, got the folder /",)),
        (("trace", "record", "/nowhere/out"), ("OUT must be in a folder that exists, got /nowhere/out",)),
        (("trace", "record", "out", "--prompts", "/nowhere"), ("--prompts must be a file that exists",)),
        (("trace", "record", "out", "--max-tokens", "0"), ("--max-tokens must be at least 1, got 0",)),
        (("trace", "record", "out", "--hidden-layers", "-1"), ("--hidden-layers must be at least 0, got '-1'",)),
        (("trace", "record", "out", "--seconds", "nan"), ("--seconds must be above 0, got nan",)),
        (("predict", "eval", __file__, "--json", "/nowhere/x"), ("--json must be in a folder that exists",)),
        (("predict", "eval", __file__, "--batches", "0"), ("--batches must be at least 1, got 0",)),
        (("simulate", "--arrivals", "/nowhere", "--generate", "1x2x1"), ("--arrivals must be a file that exists",)),
        (("simulate", "--generate", "1x2x1", "--report", "/"), ("--report must be a file, got the folder /",)),
        (("plan", "--prior", "/nowhere", "--ttft-slo", "1", "--tpot-slo", "1"), ("--prior must be a file",)),
    ],
    ids=lambda value: "-".join(value)[:40],
)
def test_a_mistake_is_one_line_that_names_the_option(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("moeless: ")
    for word in words:
        assert word in line


# -- extras ------------------------------------------------------------------------------------------------------------

_BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
BLOCKED = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Block())
from moeless.cli import main
sys.argv[0] = "moeless"
main()
"""


def run_without(modules: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _BLOCK, modules, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize(
    ("modules", "arguments", "words"),
    [
        ("ray", ("serve", "moeless-mini"), ("moeless serve needs ray,", "pip install 'moeless[serve]'")),
        ("ray,torch", ("serve", "moeless-mini"), ("ray, torch, which are", "'moeless[serve]'")),
        ("torch", ("pack", ".", "out"), ("moeless pack needs torch,", "'moeless[serve]'")),
        ("zmq", ("serve", "moeless-mini"), ("zmq", "'moeless[serve]'")),
        ("numba", ("simulate", "--generate", "1x2x1"), ("moeless simulate needs numba,", "'moeless[plan]'")),
        ("scipy", ("plan", "--ttft-slo", "1", "--tpot-slo", "1"), ("moeless plan needs scipy,", "'moeless[plan]'")),
        ("sklearn", ("predict", "fit", __file__, "out"), ("sklearn", "'moeless[plan]'")),
        ("safetensors", ("trace", "info", __file__), ("safetensors", "'moeless[plan]'")),
        ("matplotlib", ("trace", "info", __file__, "--heatmap", "x"), ("--heatmap", "'moeless[plot]'")),
        ("matplotlib", ("predict", "eval", __file__, "--plot", "x"), ("--plot", "'moeless[plot]'")),
        ("matplotlib", ("simulate", "--generate", "1x2x1", "--report", "x"), ("--report", "'moeless[plot]'")),
        (
            "torch",
            ("trace", "record", "out", "--prompts", __file__, "--model", "moeless-mini"),
            ("moeless trace record --prompts needs torch", "'moeless[serve]'"),
        ),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, tuple) else value,
)
def test_a_command_names_the_extra_that_is_missing(
    modules: str, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    result = run_without(modules, *arguments)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    for word in words:
        assert word in line


@pytest.mark.parametrize("arguments", [("--help",), ("serve", "--help"), ("simulate", "--help"), ("policy", "schema")])
def test_help_and_policies_need_no_extra(arguments: tuple[str, ...]) -> None:
    every = ",".join(module for modules in MODULES.values() for module in modules)
    result = run_without(every, *arguments)
    assert result.returncode == 0, result.stderr


def test_the_extras_are_those_of_the_project_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, modules in MODULES.items():
        named = {_DISTRIBUTION_OF_MODULE.get(module, module).replace("_", "-") for module in modules}
        declared = {
            requirement.partition("[")[0].partition(">")[0].partition("=")[0].partition("<")[0].strip()
            for requirement in project[extra]
            if not requirement.startswith("moeless[")
        }
        assert named == declared


def test_the_docs_of_serving_have_every_option() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    table = text.partition("| option |")[2].partition("\n\n")[0]
    written = set(re.findall(r"`(--[a-z-]+)", table))
    options = {
        option
        for param in COMMANDS[("serve",)].params
        if not param.hidden
        for option in (*param.opts, *param.secondary_opts)
        if option.startswith("--")
    }
    assert written == options - {"--help"}
