"""Pages in a real browser: nothing is wider than the window, narrow or wide, light or dark, whatever the texts."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.report.comparison import Champion
from manyeyes.evaluation.report.writing import build_report, write_report
from manyeyes.recipe import load_recipe
from tests import page_toys
from tests.page_toys import render_all
from tests.report_toys import make_evaluation

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium"),
]

# The page is shown in a frame, because a headless window is at least 500 pixels wide.
FRAME = """<!doctype html><iframe id="page" src="{page}" style="width:{width}px;height:2000px;border:0"></iframe>
<script>document.getElementById("page").onload = (event) => {{
  const shown = event.target.contentDocument;
  const colour = event.target.contentWindow.getComputedStyle(shown.body).backgroundColor;
  const cut = [...shown.querySelectorAll(".scroll, pre")].filter((part) => part.scrollWidth > part.clientWidth).length;
  document.body.dataset.found = shown.documentElement.scrollWidth + " " + cut + " " + colour;
}}</script>"""


def look(page: Path, *, width: int, dark: bool) -> tuple[int, int, str]:
    """How wide a page is in a window of a width (pixels), how many of its parts scroll sideways, and its colour."""
    frame = page.with_name(f"frame-{width}-{dark}.html")
    frame.write_text(FRAME.format(page=page.name, width=width), encoding="utf-8")
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"),
        *(f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={page.parent / 'profile'}"),
        *("--virtual-time-budget=5000", "--hide-scrollbars", "--window-size=1400,2000", "--dump-dom", frame.as_uri()),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    found = re.search(r'data-found="(\d+) (\d+) ([^"]+)"', result.stdout)
    assert found is not None, result.stdout[-500:] + result.stderr[-500:]
    return int(found[1]), int(found[2]), found[3]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    card, outcomes, benchmarks = make_evaluation(list(BENCHMARKS))
    champion, _, _ = make_evaluation(list(BENCHMARKS), seed=1, digest="k" * 64, kind="bundle")
    name = "manyeyes-a-rather-long-model-name-of-somebody version 12"
    report = build_report(
        card, outcomes, benchmarks, recipe=load_recipe("tiny"), champion=Champion(name, scorecard=champion)
    )
    write_report(folder, report, benchmarks)
    return folder / "report.html"


@pytest.mark.parametrize("width", [390, 1280])
def test_a_report_of_all_benchmarks_fits_its_window(page: Path, width: int) -> None:
    light, _, white = look(page, width=width, dark=False)
    dark, _, black = look(page, width=width, dark=True)
    assert (light, dark) == (width, width)
    assert (white, black) == ("rgb(255, 255, 255)", "rgb(20, 22, 26)")


# Kubeflow's UI shows a page in a frame of 640 pixels.
@pytest.mark.parametrize("width", [390, 640])
def test_every_page_fits_its_window(width: int, tmp_path: Path) -> None:
    pages = render_all(lambda value: value, tmp_path / "data")
    for name, text in pages.items():
        if name.endswith(".html"):
            (tmp_path / name).write_text(text, encoding="utf-8")
            found, scrolled, _ = look(tmp_path / name, width=width, dark=False)
            assert found == width, name
            assert not scrolled or width < 640, name


@pytest.mark.parametrize("width", [390, 640])
def test_texts_without_a_space_wrap_on_every_page(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_toys, "EVIL", "sha256:" + "0123456789abcdef" * 4)
    pages = render_all(page_toys.spoil, tmp_path / "data")
    for name, text in pages.items():
        if name.endswith(".html"):
            (tmp_path / name).write_text(text, encoding="utf-8")
            assert look(tmp_path / name, width=width, dark=False)[0] == width, name
