"""Every page and note, with markup in every text that it shows; and the charts that they share."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from jinja2 import UndefinedError

import manyeyes
from manyeyes.pages import Bar, Point, Table, Text, Timeline, render, scatter, step_page
from manyeyes.pages.rendering import TEMPLATES
from tests.page_toys import EVIL, PARTS, render_all, spoil


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return render_all(lambda value: value, tmp_path_factory.mktemp("plain") / "data")


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return render_all(spoil, tmp_path_factory.mktemp("spoiled") / "data")


class _Reader(HTMLParser):
    """Counts tags with the names of their attributes, and keeps all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[tuple[str, ...]] = Counter()
        self.values: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Iterable[tuple[str, str | None]]) -> None:
        attrs = list(attrs)
        # On which side of its point a label stands depends on its length.
        self.tags[(tag, *sorted({name for name, _ in attrs} - {"dx", "text-anchor"}))] += 1
        self.values += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


HTML = [name.name for name in sorted(TEMPLATES.glob("*.html")) if name.name not in PARTS]


def test_every_template_has_a_case(plain: dict[str, str]) -> None:
    templates = {path.name for path in TEMPLATES.iterdir() if path.suffix in (".html", ".md")}
    assert templates - PARTS == set(plain)


@pytest.mark.parametrize("name", HTML)
def test_markup_in_any_text_of_a_page_stays_text(name: str, plain: dict[str, str], spoiled: dict[str, str]) -> None:
    before, after = _Reader(plain[name]), _Reader(spoiled[name])
    assert after.tags == before.tags
    assert after.tags[("script",)] == before.tags[("script",)] == 0
    shown = "".join(after.texts)
    assert shown.count(EVIL) >= 5
    assert "alert(1)" not in "".join(value for key, value in after.values if key in ("class", "style", "src"))


@pytest.mark.parametrize("name", HTML)
def test_a_page_is_one_file_that_loads_nothing(name: str, plain: dict[str, str]) -> None:
    assert plain[name].startswith("<!doctype html>\n")
    assert plain[name].count("prefers-color-scheme: dark") == plain[name].count("<!doctype")
    assert not re.search(r"<script|<link|url\(|@import", plain[name])
    assert [v for key, v in _Reader(plain[name]).values if key == "src" and not v.startswith("data:")] == []


def test_markup_in_a_note_stays_text(spoiled: dict[str, str]) -> None:
    notes = {name: text for name, text in spoiled.items() if not name.endswith(".html")}
    assert len(notes) == 10
    for name, text in notes.items():
        assert "&lt;script>alert(1)" in text, name
        lines = [line for line in text.splitlines() if not line.startswith("    ")]
        assert not [line for line in lines if "<" in line], name
        # A cell ends where the table says, and nowhere else.
        for line in lines:
            assert not line.startswith("| ") or line.endswith(" |"), name


def test_nothing_else_writes_markup() -> None:
    sources = [path for path in Path(manyeyes.__file__).parent.rglob("*.py") if "pages" not in path.parts]
    tags = r"</?(a|b|br|code|dd|details|div|h\d|html|li|main|p|pre|span|style|sup|svg|table|td|th|tr|ul)[ >]"
    assert {
        path.name
        for path in sources
        if re.search(rf"^(from|import) (html|markupsafe)\b|(?<!`){tags}", path.read_text(encoding="utf-8"), re.M)
    } == set()
    templates = "".join(path.read_text(encoding="utf-8") for path in TEMPLATES.iterdir())
    assert not re.search(r"\|\s*safe|autoescape", templates)


def test_a_value_that_a_template_lacks_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="sentence"):
        render("step.html", title="t", sections={})


def test_bars_end_where_their_scale_ends() -> None:
    bar = Bar("a", "1", scale=(-2.0, 2.0))
    assert [bar.at(value) for value in (-9, -2, 0, 1, 9)] == [0, 0, 50, 75, 100]


def test_no_label_of_a_scatter_stands_on_another() -> None:
    rng = random.Random(0)
    names = [f"benchmark-{number}" for number in range(40)]
    points = [Point(rng.gauss(0, 1), rng.gauss(0, 1), name, name, "on") for name in names]
    plot = scatter(points, x_label="x", width=640, height=600)
    labels = [label for label in plot.labels if label.kind == "name"]
    assert [label.text for label in labels] == sorted(names, key=lambda name: -points[names.index(name)].y)
    boxes = []
    for label in labels:
        start = 6.4 * label.x + label.shift - (6.8 * len(label.text) if label.anchor == "end" else 0)
        boxes.append((start, start + 6.8 * len(label.text), label.y))
    for place, (start, end, y) in enumerate(boxes):
        assert all(abs(y - other) >= 13 or end <= left or right <= start for left, right, other in boxes[:place])
        assert 0 <= y <= plot.height


def test_a_logarithmic_axis_gives_equal_room_to_equal_ratios() -> None:
    points = [Point(x, 1.0, str(number), "", "on") for number, x in enumerate((10, 100, 1000))]
    left, middle, right = (point.x for point in scatter(points, x_label="x", logarithmic=True).points)
    assert middle - left == pytest.approx(right - middle)


def test_a_table_is_the_same_in_html_and_markdown() -> None:
    table = Table(
        ("name", "n"), [[Text("a|b", "more", (1, 2), mark="**"), "3"], ["c", Text("d", link="https://e")]], numbers=(1,)
    )
    assert table.markdown().splitlines() == [
        "| name | n |",
        "| --- | ---: |",
        "| **a\\|b** [1, 2] (more) | 3 |",
        "| c | [d](https://e) |",
    ]
    shown = "".join(_Reader(step_page("t", "s", {"": table})).texts)
    assert all(text in shown for text in ("name", "a|b", "[1, 2]", "more", "3", "c", "d"))


def test_histograms_of_a_column_have_bins_of_whole_numbers() -> None:
    from manyeyes.data.validation_report import _histogram

    drawing = _histogram(pd.Series([1, 1, 2, 40]))
    assert [box.title for box in drawing.boxes][:2] == ["1 to 3: 3", "4 to 6: 0"]
    assert [label.text for label in drawing.labels] == ["1", "median 2", "40"]


@pytest.mark.parametrize("seconds", [0.0, 0.4, 3.0, 59.0, 600.0, 5_000.0, 90_000.0, 3_000_000.0])
def test_timeline_of_any_length_has_a_few_moments_in_order_and_none_at_its_edge(seconds: float) -> None:
    ticks = Timeline([], seconds).ticks()
    places = [place for place, _ in ticks]
    assert 1 <= len(ticks) <= 6
    assert places == sorted(set(places))
    assert places[0] == 0.0
    assert places[-1] <= 95.0
    assert ticks[0][1] == "0:00"
