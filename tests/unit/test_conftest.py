"""The net under every other test: what tests/conftest.py catches, seen from a small test run of its own."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

pytest_plugins = ["pytester"]


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest((Path(__file__).parents[1] / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers =\n    redis\n")
    return pytester


def test_a_process_that_outlives_its_test_is_ended_and_reported(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import subprocess, pathlib

        def test_leaves_a_process_behind():
            child = subprocess.Popen(["sleep", "300"])
            pathlib.Path("pid").write_text(str(child.pid))
        """
    )
    result = suite.runpytest_subprocess()
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*processes left behind by this test: *sleep 300*"])
    assert not psutil.pid_exists(int((suite.path / "pid").read_text()))


def test_a_process_of_a_wider_fixture_may_live_and_start_others(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import subprocess, psutil, pytest

        @pytest.fixture(scope="module")
        def server():
            server = subprocess.Popen(["sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            yield server
            for process in [*psutil.Process(server.pid).children(), server]:
                process.kill()
            server.communicate()

        def test_starts_a_grandchild(server):
            server.stdin.write("sleep 300 & echo started\\n")
            server.stdin.flush()
            assert server.stdout.readline() == "started\\n"
        """
    )
    suite.runpytest_subprocess().assert_outcomes(passed=1)


@pytest.mark.parametrize(("required", "num_skipped"), [("", 2), ("1", 1)])
def test_ci_does_not_let_a_test_of_what_it_installs_skip(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, required: str, num_skipped: int
) -> None:
    monkeypatch.setenv("MOELESS_REQUIRE_ALL", required)
    suite.makepyfile(
        """
        import pytest

        @pytest.mark.redis
        def test_with_redis():
            pytest.skip("no redis")

        def test_for_another_platform():
            pytest.skip("not here")
        """
    )
    result = suite.runpytest_subprocess()
    counts = result.parseoutcomes()
    # Where redis-server is missing, its skip comes before the test and so is an error instead of a failure.
    num_failed = counts.get("failed", 0) + counts.get("errors", 0)
    assert (counts.get("skipped", 0), num_failed) == (num_skipped, 2 - num_skipped)
    assert (result.ret == pytest.ExitCode.OK) == (num_skipped == 2)
