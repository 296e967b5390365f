"""Run benchmarks: `python -m benchmarks [--list] [--all] [NAME ...]`. `make bench` calls it.

A benchmark is a module of this folder with a `main` that reads its own arguments and knows `--quick`. Each runs in
a process of its own, so that one's threads and memory do not show in another's figures.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def find_benchmarks() -> dict[str, str]:
    """Name → first line of the docstring, for every module here that has a `main`."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        if path.stem.startswith("_"):
            continue
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main() -> int:
    """Run the benchmarks named on the command line, all of them by default; returns how many failed."""
    benchmarks = find_benchmarks()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run benchmarks, quickly by default.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which ones; all by default")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--all", action="store_true", help="every size and repeat, as in docs/benchmarks.md")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(benchmarks))
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are: {', '.join(benchmarks) or 'none'}")
    if arguments.list:
        for name, summary in benchmarks.items():
            print(f"{name:24} {summary}")
        return 0
    failed = []
    for name in arguments.names or benchmarks:
        print(f"\n## {name}: {benchmarks[name]}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *([] if arguments.all else ["--quick"])]
        if subprocess.run(command, cwd=FOLDER.parent, check=False).returncode != 0:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
