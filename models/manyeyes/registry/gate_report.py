"""The gate's table, for a person."""

from __future__ import annotations

from manyeyes.pages import Table, Text, render
from manyeyes.registry.gate import GateReport


def render_gate_html(report: GateReport) -> str:
    """One HTML file without scripts or references."""
    return _render("gate.html", report)


def render_gate_markdown(report: GateReport) -> str:
    """The same as Markdown, for a terminal or the Kubeflow UI."""
    return _render("gate.md", report)


def _render(template: str, report: GateReport) -> str:
    rows: list[list[str | Text]] = [
        [
            f"{result.rule}: {result.benchmark}" if result.benchmark else result.rule,
            result.found,
            result.needed,
            Text("yes", kind="good") if result.passed else Text("no", kind="bad", mark="**"),
            Text(result.explanation, kind="quiet"),
        ]
        for result in report.rules
    ]
    digests = [["challenger's bundle", report.challenger]]
    digests += [["champion's bundle", report.champion_digest]] if report.champion_digest else []
    digests += [[name, digest] for name, digest in report.benchmark_digests.items()]
    failed = sum(not result.passed for result in report.rules)
    against = f"champion version {report.champion}" if report.champion else "no champion, this is the first"
    return render(
        template,
        title=f"Gate: {report.verdict}",
        verdict=report.verdict,
        summary=f"{failed} of {len(rows)} rules are not met ({against}); no alias moves."
        if failed
        else f"All {len(rows)} rules are met ({against}).",
        rules=Table(("rule", "found", "needed", "met", "why"), rows, stacked=True),
        digests=Table(("what", "digest"), digests, code=(1,)),
    )
