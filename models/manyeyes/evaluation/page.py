"""The frame of every HTML report: one file without scripts or references, light and dark, narrow and wide."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f5f6f8; --line: #d5d9e0; --text: #1a1d23; --quiet: #59616e;
  --on: #2563c9; --off: #8a93a3; --good: #1a7a3c; --bad: #b3261e; --track: #e6e9ee;
  --llava: #8a5a00; --eagle: #7a3fb0; --cambrian: #00756a; --mini-gemini: #b8175a; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1e2127; --line: #363b45; --text: #e8eaee;
  --quiet: #a3abb8; --on: #6ea2f5; --off: #838c9b; --good: #63c987; --bad: #f28b82; --track: #2a2f38;
  --llava: #e0b050; --eagle: #c49bf0; --cambrian: #4fc3b0; --mini-gemini: #f48fb1; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; }
.quiet { color: var(--quiet); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .85rem;
  min-width: 0; overflow-wrap: anywhere; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { display: block; color: var(--quiet); font-size: .85rem; }
.bars { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr max-content; gap: .35rem .75rem;
  align-items: center; font-variant-numeric: tabular-nums; }
.bars .group { font-weight: 600; }
.bars .next { margin-bottom: .5rem; }
.track { position: relative; height: 1rem; background: var(--track); border-radius: 3px; }
.fill { position: absolute; inset: 0 auto 0 0; border-radius: 3px; }
.on { background: var(--on); } .off { background: var(--off); }
.whisker { position: absolute; top: 50%; height: 0; border-top: 2px solid var(--text); }
.whisker::before, .whisker::after { content: ""; position: absolute; top: -5px; height: 8px;
  border-left: 2px solid var(--text); }
.whisker::before { left: 0; } .whisker::after { right: 0; }
.span { position: absolute; top: 50%; border-top: 3px solid var(--on); transform: translateY(-50%); opacity: .5; }
.mark { position: absolute; top: -3px; bottom: -3px; border-left: 2px dashed var(--bad); }
.key { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .6rem 0; font-size: .85rem; color: var(--quiet); }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .4rem;
  vertical-align: -.1rem; }
.key i.dash { width: 0; border-left: 2px dashed var(--bad); border-radius: 0; }
.glyph { font-size: .8rem; line-height: 1; }
.llava { color: var(--llava); fill: var(--llava); } .eagle { color: var(--eagle); fill: var(--eagle); }
.cambrian { color: var(--cambrian); fill: var(--cambrian); }
.mini-gemini { color: var(--mini-gemini); fill: var(--mini-gemini); }
.dot { display: inline-block; width: .75rem; height: .75rem; border-radius: 50%; }
.dot.this { background: var(--on); } .dot.champion { border: 3px solid var(--text); background: var(--page); }
.key i.dot { border-radius: 50%; }
.at { position: absolute; top: 50%; transform: translate(-50%, -50%); }
.strip .track { background: none; }
.strip .track::before { content: ""; position: absolute; left: 0; right: 0; top: 50%;
  border-top: 1px solid var(--line); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
.plot { font: 12px system-ui, "Segoe UI", sans-serif; overflow: visible; min-width: 0; }
.plot .axis { stroke: var(--line); } .plot .tick { fill: var(--quiet); } .plot .number { fill: var(--text); }
.plot .this { fill: var(--on); } .plot .champion { fill: var(--page); stroke: var(--text); stroke-width: 3; }
.plot text.llava, .plot text.eagle, .plot text.cambrian, .plot text.mini-gemini { font-size: 13px; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem;
  overflow-x: auto; font: .85em/1.45 ui-monospace, monospace; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
.scroll th:first-child, .scroll td:first-child { position: sticky; left: 0; background: var(--page); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-size: .85rem; color: var(--quiet); font-weight: 600; vertical-align: bottom; }
td.number, th.number { text-align: right; }
.nowrap { white-space: nowrap; }
td .detail { display: block; color: var(--quiet); font-size: .8rem; font-weight: 400; white-space: nowrap; }
tr.strong td { font-weight: 600; }
td sup { color: var(--quiet); font-size: .7rem; }
ol.notes { font-size: .85rem; color: var(--quiet); max-width: 46rem; padding-left: 1.75rem; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(17.5rem, 1fr)); gap: .75rem; }
.sample { display: flex; gap: .75rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .7rem; min-width: 0; }
.sample img { width: 96px; height: 96px; object-fit: contain; flex: none; border: 1px solid var(--line);
  border-radius: 4px; background: #fff; }
.sample img.small { image-rendering: pixelated; }
.sample ul { list-style: none; margin: 0; padding: 0; min-width: 0; font-size: .85rem; overflow-wrap: anywhere; }
.sample li { margin-bottom: .35rem; }
details { margin-top: 2rem; } summary { cursor: pointer; color: var(--quiet); }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
.verdict { display: inline-block; padding: .1rem .6rem; border-radius: 1rem; border: 2px solid currentColor; }
@media (max-width: 34rem) { .bars { grid-template-columns: 1fr max-content; } .bars .group { grid-column: 1 / -1; }
  .bars .group:empty { display: none; }
  .stack thead { display: none; }
  .stack, .stack tbody, .stack tr, .stack td { display: block; }
  .stack tr { border-bottom: 1px solid var(--line); padding: .5rem 0; }
  .stack td, .stack td.number { border: 0; padding: .1rem 0; text-align: left; }
  .scroll th:first-child, .scroll td:first-child { min-width: 6.5rem; max-width: 40vw; overflow-wrap: break-word; }
  .stack td:first-child { max-width: none; }
  td:first-child .detail { white-space: normal; }
  .stack td:not([data-label=""])::before { content: attr(data-label) ": "; color: var(--quiet); } }
"""


def page(title: str, body: str) -> str:
    """A whole HTML document.

    Args:
        title: Plain text.
        body: HTML.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n"
        "</html>\n"
    )


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = (), stacked: bool = False
) -> str:
    """An HTML table that scrolls by itself where it is too wide.

    Args:
        header: Plain text of each column.
        rows: HTML of each cell.
        numbers: Columns that are aligned right.
        stacked: Whether a narrow screen shows cells below each other instead; for tables with sentences in them.
    """

    def cell(tag: str, position: int, text: str) -> str:
        kind = ' class="number"' if position in numbers else ""
        label = f' data-label="{escape(header[position])}"' if tag == "td" and stacked else ""
        return f"<{tag}{kind}{label}>{text}</{tag}>"

    def line(tag: str, texts: Sequence[str]) -> str:
        return f"<tr>{''.join(cell(tag, position, text) for position, text in enumerate(texts))}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    head = line("th", [escape(text) for text in header])
    start = '<table class="stack">' if stacked else "<table>"
    return f'<div class="scroll">{start}\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; ``|`` and line ends inside cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
