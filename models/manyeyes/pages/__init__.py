"""Pages and notes for people, made from the templates in this folder.

A caller prepares plain data and names a template. There is one stylesheet, one set of charts, and every page is one
file without scripts or references: Kubeflow shows it in a frame that may load nothing.
"""

from manyeyes.pages.charts import (
    Bar,
    Box,
    Curve,
    Drawing,
    Label,
    Line,
    Mark,
    Point,
    Stretch,
    Timeline,
    draw_bars,
    draw_curves,
    scatter,
)
from manyeyes.pages.rendering import (
    NONE,
    Picture,
    Table,
    Text,
    amount,
    duration,
    facts_table,
    make_picture,
    markdown_table,
    readable,
    render,
    short_count,
    span,
    step_page,
    two_decimals,
)

__all__ = [
    "NONE",
    "Bar",
    "Box",
    "Curve",
    "Drawing",
    "Label",
    "Line",
    "Mark",
    "Picture",
    "Point",
    "Stretch",
    "Table",
    "Text",
    "Timeline",
    "amount",
    "draw_bars",
    "draw_curves",
    "duration",
    "facts_table",
    "make_picture",
    "markdown_table",
    "readable",
    "render",
    "scatter",
    "short_count",
    "span",
    "step_page",
    "two_decimals",
]
