"""Conditions of every test: one thread for torch, nothing left behind, and a reason where something is missing."""

from __future__ import annotations

import os

# Before anything imports torch: with more threads than free cores, OpenMP's pools spin against each other.
os.environ["OMP_NUM_THREADS"] = "1"
# Tests bring their own models; a name that looks like the hub's fails at once instead of waiting for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import shutil
import sys
from collections.abc import Callable, Generator, Iterator

import psutil
import pytest
from hypothesis import settings

# Other processes share the cores, and what is compiled is compiled at the first example.
settings.register_profile("moeless", deadline=None)
settings.load_profile("moeless")

REQUIRED_IN_CI = frozenset({"redis", "k8s", "browser", "nodes"})
"""Markers whose tests must not skip under MOELESS_REQUIRE_ALL."""

_PYTHON_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""Processes that multiprocessing keeps for the life of the interpreter."""


def _lacks_redis() -> str | None:
    return None if shutil.which("redis-server") else "redis-server is not installed"


def _lacks_kubernetes() -> str | None:
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    if folder is None:
        return "KUBEBUILDER_ASSETS does not name a folder with kube-apiserver and etcd"
    return None if shutil.which("kube-apiserver", path=folder) else f"no kube-apiserver in {folder}"


def _lacks_nodes() -> str | None:
    program = os.environ.get("MOELESS_NODES")
    if program is None:
        return "MOELESS_NODES does not name the program that makes several machines of this one"
    if not os.access(program, os.X_OK):
        return f"MOELESS_NODES must name a program, got {program}"
    if os.geteuid() != 0:
        return "machines out of namespaces need root"
    missing = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} must be installed (iproute2, util-linux)" if missing else None


def _lacks_browser() -> str | None:
    return None if shutil.which("chromium") else "chromium is not installed"


def _lacks_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


_LACKS: dict[str, Callable[[], str | None]] = {
    "redis": _lacks_redis,
    "k8s": _lacks_kubernetes,
    "nodes": _lacks_nodes,
    "browser": _lacks_browser,
    "gpu": _lacks_gpu,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, lacks in _LACKS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = lacks() if marked else None
        if reason is not None:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under MOELESS_REQUIRE_ALL a skipped test that CI must run has failed."""
    report = yield
    required = REQUIRED_IN_CI.intersection(mark.name for mark in item.iter_markers())
    if report.skipped and required and os.environ.get("MOELESS_REQUIRE_ALL") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} must not skip under MOELESS_REQUIRE_ALL: {report.longrepr}"
    return report


def pytest_runtest_setup() -> None:
    """An engine in an earlier test may have set another number of threads."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def _children() -> set[psutil.Process]:
    return {child for child in psutil.Process().children(recursive=True) if not _is_python_helper(child)}


def _is_python_helper(process: psutil.Process) -> bool:
    try:
        return any(helper in part for part in process.cmdline() for helper in _PYTHON_HELPERS)
    except psutil.NoSuchProcess:
        return True


def _descends_from(process: psutil.Process, ancestors: set[psutil.Process]) -> bool:
    try:
        return not ancestors.isdisjoint(process.parents())
    except psutil.NoSuchProcess:
        return True


def _end_those_left(left: set[psutil.Process], *, grace_s: float) -> list[str]:
    """Wait for processes that are on their way out, kill the others and describe them."""
    _, alive = psutil.wait_procs(left, timeout=grace_s)
    described = []
    for process in alive:
        try:
            described.append(f"{process.pid}: {' '.join(process.cmdline())[:200]} ({process.status()})")
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=grace_s)
    return described


@pytest.fixture(autouse=True, scope="session")
def no_process_outlives_the_run() -> Iterator[None]:
    yield
    described = _end_those_left(_children(), grace_s=10.0)
    assert not described, f"processes left behind at the end of the run: {described}"


@pytest.fixture(autouse=True)
def no_process_outlives_its_test(no_process_outlives_the_run: None) -> Iterator[None]:
    """Fixtures of a wider scope (a Ray cluster) keep theirs, and what those start belongs to them."""
    before = _children()
    yield
    left = {child for child in _children() - before if not _descends_from(child, before)}
    if left:
        described = _end_those_left(left, grace_s=5.0)
        assert not described, f"processes left behind by this test: {described}"
