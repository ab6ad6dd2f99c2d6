"""The frame of every HTML report: one file without scripts or references, light and dark, narrow and wide."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f5f6f8; --line: #d5d9e0; --text: #1a1d23; --quiet: #59616e;
  --on: #2563c9; --off: #8a93a3; --good: #1a7a3c; --bad: #b3261e; --track: #e6e9ee; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1e2127; --line: #363b45; --text: #e8eaee;
  --quiet: #a3abb8; --on: #6ea2f5; --off: #838c9b; --good: #63c987; --bad: #f28b82; --track: #2a2f38; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; }
.quiet { color: var(--quiet); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .85rem; }
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
.mark { position: absolute; top: -3px; bottom: -3px; border-left: 2px dashed var(--bad); }
.key { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .6rem 0; font-size: .85rem; color: var(--quiet); }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .4rem;
  vertical-align: -.1rem; }
.key i.dash { width: 0; border-left: 2px dashed var(--bad); border-radius: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-size: .85rem; color: var(--quiet); font-weight: 600; }
td.number, th.number { text-align: right; }
.nowrap { white-space: nowrap; }
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
  .stack td { border: 0; padding: .1rem 0; }
  .stack td::before { content: attr(data-label) ": "; color: var(--quiet); } }
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
