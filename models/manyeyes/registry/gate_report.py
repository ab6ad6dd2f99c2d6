"""The gate's table, for a person."""

from __future__ import annotations

from html import escape

from manyeyes.evaluation.page import markdown_table, page, table
from manyeyes.registry.gate import GateReport, RuleResult

_HEADER = ["rule", "found", "needed", "met", "why"]


def render_gate_html(report: GateReport) -> str:
    """One HTML file without scripts or references."""
    kind = "good" if report.verdict == "passed" else "bad"
    rows = [
        [
            escape(_name(result)),
            escape(result.found),
            escape(result.needed),
            '<span class="good nowrap">yes ✓</span>' if result.passed else '<span class="bad nowrap">no ✗</span>',
            f'<span class="quiet">{escape(result.explanation)}</span>',
        ]
        for result in report.rules
    ]
    digests = [[escape(name), f"<code>{escape(digest)}</code>"] for name, digest in report.benchmark_digests.items()]
    body = [
        f'<h1>Gate: <span class="verdict {kind}">{report.verdict}</span></h1>',
        f"<p>{escape(_summary(report))}</p>",
        table(_HEADER, rows, stacked=True),
        f"<details><summary>Digests</summary>{table(['what', 'digest'], [*_models(report), *digests])}</details>",
    ]
    return page(f"Gate: {report.verdict}", "\n".join(body))


def render_gate_markdown(report: GateReport) -> str:
    """The same as Markdown, for a terminal or the Kubeflow UI."""
    rows = [
        [_name(result), result.found, result.needed, "yes" if result.passed else "**no**", result.explanation]
        for result in report.rules
    ]
    return f"# Gate: {report.verdict}\n\n{_summary(report)}\n\n{markdown_table(_HEADER, rows)}\n"


def _name(result: RuleResult) -> str:
    return f"{result.rule}: {result.benchmark}" if result.benchmark else result.rule


def _summary(report: GateReport) -> str:
    failed = sum(not result.passed for result in report.rules)
    against = f"champion version {report.champion}" if report.champion else "no champion, this is the first"
    if failed:
        return f"{failed} of {len(report.rules)} rules are not met ({against}); no alias moves."
    return f"All {len(report.rules)} rules are met ({against})."


def _models(report: GateReport) -> list[list[str]]:
    rows = [["challenger's bundle", f"<code>{escape(report.challenger)}</code>"]]
    if report.champion_digest:
        rows.append(["champion's bundle", f"<code>{escape(report.champion_digest)}</code>"])
    return rows
