"""The report as text, and as a browser shows it."""

from __future__ import annotations

import html.parser
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from moeless.simulate.report.html import report_html
from moeless.simulate.report.results import SimulationReport
from moeless.simulate.report.tables import comparison_tables, result_sentence
from moeless.simulate.scenario import Scenario
from moeless.simulate.settings import described
from moeless.simulate.simulation import simulate
from moeless.simulate.systems import make_systems
from moeless.simulate.workload import made_up_arrivals
from tests.support.browser import Browser

MakeScenario = Callable[..., Scenario]
PLOTS = ("latency", "replicas", "load", "imbalance")


@pytest.fixture(name="report", scope="module")
def report_fixture(make_scenario: MakeScenario) -> SimulationReport:
    scenario = make_scenario()
    profile = replace(scenario.profile, name="<script>alert('profile')</script>", source='measured & "made up"')
    scenario = replace(scenario, profile=profile)
    return SimulationReport(
        scenario=described(scenario),
        settings={"workers": 4},
        slo_s=(0.5, 0.05),
        expert_bytes=profile.model.expert_bytes,
        capacity_instances=400,
        results=[
            simulate(scenario, system, slo=(0.5, 0.05))
            for system in make_systems(scenario, names=["static", "moeless", "limit"])
        ],
    )


@pytest.fixture(name="page", scope="module")
def page_fixture(report: SimulationReport) -> str:
    return report_html(report)


class _Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_holds_every_cell_of_the_tables_and_every_assumption(report: SimulationReport, page: str) -> None:
    words = {word.strip() for word in _Page(page).words}
    for table in comparison_tables(report.results):
        assert words >= {cell for row in table.rows for cell in row}
    assert words >= set(report.scenario.values())


def test_the_page_begins_with_its_result_in_one_sentence(report: SimulationReport, page: str) -> None:
    sentence = result_sentence(report.results)
    assert page.index(sentence) < page.index("<table")
    static, moeless, limit = report.results
    fast, slow = sorted((static, moeless), key=lambda result: result.layer_s.mean)
    assert f"{fast.layer_s.mean * 1e6:,.0f} µs" in sentence
    assert sentence.startswith(fast.system)
    assert f"the limit of every plan is {limit.layer_s.mean * 1e6:,.0f} µs." in sentence
    if fast is moeless:
        assert f"{moeless.layer_s.mean / slow.layer_s.mean - 1:+.0%} against static" in sentence


@pytest.mark.parametrize("names", [["static"], ["limit"], ["moeless", "static"], ["moeless"]])
def test_a_result_is_said_of_any_systems(report: SimulationReport, names: list[str]) -> None:
    chosen = [result for name in names for result in report.results if result.system == name]
    sentence = result_sentence(chosen)
    assert sentence.endswith(".")
    assert any(sentence.startswith(name) for name in names)


def test_text_of_a_user_is_never_markup(page: str) -> None:
    read = _Page(page)
    assert "script" not in {tag for tag, _ in read.tags}
    assert any("<script>alert" in word for word in read.words)


def test_the_page_asks_for_nothing_from_elsewhere(page: str) -> None:
    read = _Page(page)
    for tag, attributes in read.tags:
        for name in ("src", "href", "xlink:href", "action"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")), (tag, attributes)
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_every_plot_says_in_words_what_it_shows(page: str) -> None:
    labels = [attributes["aria-label"] for tag, attributes in _Page(page).tags if tag == "svg"]
    assert len(labels) == len(PLOTS)
    assert all(label is not None and len(label) > 60 for label in labels)


def test_names_within_a_plot_are_its_own(page: str) -> None:
    names = [attributes["id"] for _, attributes in _Page(page).tags if "id" in attributes]
    assert len(set(names)) == len(names)
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", page))
    assert {first or second for first, second in used} <= set(names)


def test_the_same_results_make_the_same_page(report: SimulationReport, page: str) -> None:
    assert report_html(report) == page


def test_answers_of_one_token_have_a_report_too(report: SimulationReport, make_scenario: MakeScenario) -> None:
    arrivals = made_up_arrivals(rate_per_s=1, num_requests=1, prompt_tokens=30, output_tokens=1)
    scenario = make_scenario(arrivals=arrivals)
    (system,) = make_systems(scenario, names=["limit"])
    alone = msgspec.structs.replace(report, slo_s=None, results=[simulate(scenario, system)])
    assert "within" not in _Page(report_html(alone)).words


def test_without_matplotlib_the_error_says_what_to_install(
    report: SimulationReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'moeless\[plot\]'"):
        report_html(report)


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page(report: SimulationReport, page: str, tmp_path: Path, *, dark: bool) -> None:
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    with Browser(tmp_path / "profile", dark=dark) as browser:
        browser.open(path.as_uri())
        assert browser.complaints == []
        assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
        for name in PLOTS:
            box = browser.evaluate(
                f"JSON.parse(JSON.stringify(document.querySelector('#{name} svg').getBoundingClientRect()))"
            )
            assert box["width"] > 600
            assert box["height"] > 150
            assert browser.evaluate(f"document.querySelectorAll('#{name} svg path').length") > len(report.results)
            assert _contrast(browser, f"#{name} svg text") > 7
            assert _contrast(browser, f"#{name} figcaption") > 4.5
        assert _contrast(browser, "td") > 7
        # Nothing sticks out of a narrow window: what is too wide scrolls by itself.
        browser.call("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=False)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 400


def _contrast(browser: Browser, selector: str) -> float:
    """Of an element's text to the page, as WCAG defines it."""

    def luminance(colour: str) -> float:
        channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def style(element: str, name: str) -> Any:
        return browser.evaluate(f"getComputedStyle({element}).{name}")

    is_drawn = " svg " in selector
    text = style(f"document.querySelector('{selector}')", "fill" if is_drawn else "color")
    page = style("document.body", "backgroundColor")
    low, high = sorted((luminance(text), luminance(page)))
    return (high + 0.05) / (low + 0.05)
