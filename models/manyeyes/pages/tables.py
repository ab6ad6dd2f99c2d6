"""Tables as plain text, once for HTML and Markdown, so that the two cannot differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from manyeyes.pages.words import readable


@dataclass(frozen=True)
class Text:
    """A cell with more than a text in it.

    Attributes:
        main: What matters.
        detail: Smaller, beside or below it.
        notes: Numbers of notes.
        kind: How the page shows it: ``good``, ``bad``, ``warn``, ``quiet``, ``strong`` or ``code``.
        link: Where it leads.
        mark: What Markdown puts around it, which has no colours.
    """

    main: str
    detail: str = ""
    notes: tuple[int, ...] = ()
    kind: str = ""
    link: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        header: Of each column; two columns without any title have no head.
        rows: Cells of each row.
        numbers: Columns that are aligned right.
        strong: Rows that stand out.
        stacked: Whether a narrow screen shows cells below each other; for tables with sentences in them.
        code: Columns that hold digests or file text.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    numbers: Sequence[int] = ()
    strong: frozenset[int] = field(default_factory=frozenset)
    stacked: bool = False
    code: Sequence[int] = ()

    def cells(self) -> list[list[Text]]:
        """The rows, with every cell in full."""
        return [[value if isinstance(value, Text) else Text(value) for value in row] for row in self.rows]

    def markdown(self) -> str:
        """The table in Markdown."""
        rows = [[_in_markdown(cell) for cell in row] for row in self.cells()]
        return markdown_table(self.header, rows, numbers=self.numbers)


def facts_table(rows: Sequence[tuple[str, object]]) -> Table:
    """Names and values, as a person writes them."""
    return Table(("", ""), [[name, readable(value)] for name, value in rows])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """A Markdown table; ``|`` and line ends inside cells are escaped, and so is HTML."""
    lines = [header, ["---:" if column in numbers else "---" for column in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(_escaped(text) for text in line) + " |" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def _in_markdown(cell: Text) -> str:
    main = f"[{cell.main}]({cell.link})" if cell.link else f"{cell.mark}{cell.main}{cell.mark}"
    notes = f" [{', '.join(map(str, cell.notes))}]" if cell.notes else ""
    detail = f" ({cell.detail})" if cell.detail else ""
    return f"{main}{notes}{detail}"
