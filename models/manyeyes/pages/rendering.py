"""Templates to text: HTML with everything escaped, Markdown in which viewers see no HTML."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from manyeyes.pages.charts import Drawing
from manyeyes.pages.tables import Table
from manyeyes.pages.words import amount, duration, short_count, span, two_decimals

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **values: object) -> str:
    """A whole page (``*.html``) or note (``*.md``).

    Args:
        template: File name in ``templates/``.
        values: What the template shows; a name that is missing is an error.
    """
    return _environment(template.endswith(".html")).get_template(template).render(values)


def step_page(title: str, sentence: str, sections: Mapping[str, Table | Drawing]) -> str:
    """The page of a step that has only tables and charts to show.

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
