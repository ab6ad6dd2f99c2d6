"""Templates to text: HTML with everything escaped, Markdown in which viewers see no HTML.

Numbers are put in words, the same on every page; tables are plain text, once for HTML and Markdown, so that the two
cannot differ; images inside a page are small enough to travel with it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from manyeyes.pages.charts import Drawing

if TYPE_CHECKING:
    from jinja2 import Environment
if TYPE_CHECKING:
    import numpy as np

NONE = "-"


def two_decimals(value: float | None) -> str:
    """A score with two decimals; a dash for none."""
    return NONE if value is None else f"{value:.2f}"


def span(interval: tuple[float, float], *, signed: bool = False) -> str:
    """An interval in words."""
    low, high = (f"{end:+.2f}" if signed else f"{end:.2f}" for end in interval)
    return f"{low} to {high}"


def short_count(count: float | None) -> str:
    """A large number with a unit, three digits or four; a dash for none."""
    if count is None:
        return NONE
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:,.0f}"


def amount(number: float) -> str:
    """A large number with three digits and a prefix: 1.23 M, 45.6 G."""
    for prefix, unit in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= unit:
            return f"{number / unit:.3g} {prefix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole < 6000 else f"{whole // 3600} h {whole % 3600 // 60} min"


def readable(value: object) -> str:
    """A value as a person writes it: thousands separated, four digits that count."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


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


TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **values: object) -> str:
    """A whole page (``*.html``) or note (``*.md``).

    Args:
        template: File name in ``templates/``.
        values: What the template shows; a name that is missing is an error.
    """
    return _environment(template.endswith(".html")).get_template(template).render(values)


def step_page(title: str, sentence: str, sections: Mapping[str, Table | Drawing | str]) -> str:
    """The page of a step that has only tables, charts and texts of files to show.

    Args:
        title: Of the page.
        sentence: What it shows.
        sections: By heading; the part under an empty one stands first, without a heading.
    """
    return render("step.html", title=title, sentence=sentence, sections=sections)


@cache
def _environment(html: bool) -> Environment:
    # Here, as the command line must not wait for it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=None if html else _plain,
    )
    environment.filters |= {
        "amount": amount,
        "count": "{:,}".format,
        "duration": duration,
        "two_decimals": two_decimals,
        "short_count": short_count,
        "span": span,
        "signed": "{:+.2f}".format,
        "indented": _Code,
    }
    return environment


def _plain(value: object) -> object:
    return value.replace("<", "&lt;") if type(value) is str else value


class _Code(str):
    """A block of code in Markdown: it is shown as it is, and indented, so that nothing in it can end it."""

    def __new__(cls, text: str) -> _Code:
        return super().__new__(cls, "\n".join(f"    {line}".rstrip() for line in text.splitlines()))


_THUMBNAIL_PIXELS = 256
_SMALL_PIXELS = 96
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class Picture:
    """An image as a page holds it.

    Attributes:
        source: A ``data:`` address.
        small: Whether its pixels are to be seen as squares.
    """

    source: str
    small: bool


def make_picture(pixels: np.ndarray) -> Picture:
    """PNG where the image is tiny, JPEG of at most 256 pixels a side otherwise.

    Args:
        pixels: ``[H, W, 3]``, uint8.
    """
    from PIL import Image

    image = Image.fromarray(pixels)
    small = max(image.size) <= _SMALL_PIXELS
    image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    if small:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    kind = "png" if small else "jpeg"
    return Picture(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", small)
