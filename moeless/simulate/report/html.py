"""A simulation as one HTML page that needs nothing else: tables, plots, and every assumption in words."""

from __future__ import annotations

from html import escape

from moeless.simulate.report.plots import Plot, report_plots
from moeless.simulate.report.results import SimulationReport
from moeless.simulate.report.tables import TextTable, comparison_tables, result_sentence

_STYLE = """
:root { color-scheme: light dark; --text: #1c2126; --page: #ffffff; --grid: #c9ced4; --line: #d8dde2; --soft: #5a646e; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8eb; --page: #14181b; --grid: #4a535b; --line: #353d44; --soft: #a3adb6; }
}
body { color: var(--text); background: var(--page); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 72rem; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
p, figcaption, dd { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem; white-space: nowrap; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--line); }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 0; }
figure svg { display: block; width: 100%; min-width: 44rem; height: auto; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def report_html(report: SimulationReport) -> str:
    """The page.

    Raises: ModuleNotFoundError that says how to install matplotlib.
    """
    names = ", ".join(result.system for result in report.results)
    parts = [
        *(_table(table) for table in comparison_tables(report.results)),
        *(_figure(plot) for plot in report_plots(report)),
        _words("Scenario and assumptions", report.scenario),
        _words("Settings", {name: str(value) for name, value in report.settings.items()} | _slo(report)),
    ]
    title = f"moeless simulate: {report.scenario['model']}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            "<h1>Simulated systems</h1>",
            f'<p id="result">{escape(result_sentence(report.results))}</p>',
            f"<p>{escape(report.scenario['model'])}<br>{escape(names)}</p>",
            *parts,
            "</body>",
            "</html>",
            "",
        ]
    )


def _table(table: TextTable) -> str:
    head = "".join(f'<th scope="col">{"<br>".join(map(escape, header.splitlines()))}</th>' for header in table.headers)
    rows = [
        f"<tr><td>{escape(row[0])}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in table.rows
    ]
    return (
        f'<section><h2>{escape(table.title)}</h2>\n<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>\n<p>{escape(table.note)}</p></section>"
    )


def _figure(plot: Plot) -> str:
    label = escape(f"{plot.title}. {plot.caption}", quote=True)
    svg = plot.svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return (
        f'<section><h2>{escape(plot.title)}</h2>\n<figure id="{escape(plot.name, quote=True)}">'
        f'<div class="scroll">{svg}</div>\n<figcaption>{escape(plot.caption)}</figcaption></figure></section>'
    )


def _words(title: str, words: dict[str, str]) -> str:
    items = "\n".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in words.items())
    return f"<section><h2>{escape(title)}</h2>\n<dl>\n{items}\n</dl></section>"


def _slo(report: SimulationReport) -> dict[str, str]:
    if report.slo_s is None:
        return {"slo": "none"}
    return {"slo": "first token within {:g} s, each one after it within {:g} s".format(*report.slo_s)}
