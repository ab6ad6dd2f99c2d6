"""Documents that are made from code are current, and links in documents lead somewhere."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from manyeyes.estimate import SHIPPED, shipped_facts
from manyeyes.estimate.skeleton import count_facts
from manyeyes.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
ROOMS = sorted((ROOT / "models" / "manyeyes").glob("*/README.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "infra" / "README.md", *ROOMS]


def test_formats_page_is_current() -> None:
    rendered = runpy.run_path(str(ROOT / "docs" / "formats.py"))["render"]()
    assert (ROOT / "docs" / "formats.md").read_text(encoding="utf-8") == rendered, "run: make docs"


def test_recipes_page_and_the_shipped_facts_are_current() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "recipes.py"))
    shipped = json.loads(SHIPPED.read_text(encoding="utf-8"))
    assert {key for _, key in made["published"]()} == set(shipped), "run: make docs"
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == made["render"](shipped), "run: make docs"


def test_scaling_page_is_current() -> None:
    rendered = runpy.run_path(str(ROOT / "docs" / "scaling.py"))["render"]()
    assert (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8") == rendered, "run: make docs"


# One of each structure; all of them take minutes.
@pytest.mark.parametrize("name", ["llava-1.5-7b", "mini-gemini-7b-hd", "cambrian-1-8b", "eagle-x4-7b"])
def test_shipped_facts_are_what_is_counted(name: str) -> None:
    made = runpy.run_path(str(ROOT / "docs" / "recipes.py"))
    keys = {recipe.name: key for recipe, key in made["published"]()}
    assert shipped_facts(keys[name]) == count_facts(load_recipe(name)), "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def architecture() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "architecture.py"))


def test_architecture_page_is_current() -> None:
    rendered = architecture()["render"]()
    assert (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8") == rendered, "run: make docs"


def test_every_package_has_a_readme_that_says_what_it_may_import() -> None:
    layers = architecture()["read_layers"]()
    packages = [
        path.name for path in sorted((ROOT / "models" / "manyeyes").iterdir()) if (path / "__init__.py").is_file()
    ]
    assert [page.parent.name for page in ROOMS] == packages
    for page in ROOMS:
        place = next(number for number, layer in enumerate(layers) if page.parent.name in layer)
        below = ", ".join(f"`{room}`" for layer in layers[place + 1 :] for room in layer)
        assert f"**May import:** {below}." in page.read_text(encoding="utf-8"), page


def test_every_environment_variable_of_the_code_is_in_the_table_and_the_other_way_round() -> None:
    files = [
        path
        for folder in ("models", "components", "pipelines", "infra")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".yaml", ".md", ""} and path.is_file() and "dvc-remote" not in path.parts
    ]
    used = {name for path in files for name in re.findall(r"MANYEYES_[A-Z_]+[A-Z]", path.read_text(encoding="utf-8"))}
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(MANYEYES_[A-Z_]+)` \|", page, flags=re.MULTILINE)) == used


def test_performance_page_is_current_and_every_ratio_in_it_comes_with_equal_results() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "performance.py"))
    results = made["read_results"]()
    assert (ROOT / "docs" / "performance.md").read_text(encoding="utf-8") == made["render"](results), "run: make docs"
    assert results
    assert all(result["equal"]["equal"] is True and result["rounds"] >= 7 for result in results)
    names = {result["name"].split(":")[0] for result in results}
    assert all(name in (ROOT / "docs" / "performance.svg").read_text(encoding="utf-8") for name in names), "make docs"
