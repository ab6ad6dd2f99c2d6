"""Count the published recipes, and put the GPUs that each needs into docs/recipes.md.

Run ``make docs`` after changing a recipe, an encoder or the estimate; tests compare. Writes the facts that
``manyeyes.estimate`` ships (counted again only where a recipe's have changed, unless ``--all`` is given) and prints the
page.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from manyeyes.estimate import SHIPPED, RecipeFacts, counted_fields, facts_key, needs
from manyeyes.recipe import Recipe, list_recipes, load_recipe
from manyeyes.recipe.partial import take_fields
from manyeyes.sources import language_model_config_file
from manyeyes.storage import hash_file

PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- made by docs/recipes.py: begin -->\n", "<!-- made by docs/recipes.py: end -->"


def published() -> Iterator[tuple[Recipe, str]]:
    """Every published recipe, and the key of its facts."""
    for name in list_recipes():
        if name.startswith("tiny"):
            continue
        recipe = load_recipe(name)
        part = take_fields(recipe, ("model", "stages"), reader="the estimate")
        config = language_model_config_file(recipe.model.language_model.source, snapshot_path=None)
        yield recipe, facts_key(counted_fields(part), hash_file(config))


def count(known: dict[str, object]) -> dict[str, object]:
    """The facts of all of them by key; those that are known are not counted again."""
    from manyeyes.estimate.skeleton import count_facts

    return {
        key: known[key] if key in known else count_facts(recipe).model_dump(mode="json") for recipe, key in published()
    }


def render(shipped: dict[str, object]) -> str:
    """The page with its table."""
    rows = ["| recipe | stage | GPUs that it fits on | micro-batch |", "| --- | --- | --- | --- |"]
    for recipe, key in published():
        found = needs(recipe, RecipeFacts.model_validate(shipped[key]))
        for name, spec in recipe.present_stages():
            first = f"`{recipe.name}`" if name == recipe.present_stages()[0][0] else ""
            fits = ", ".join(map(str, found.fits[name])) or "none"
            rows.append(f"| {first} | {name} | {fits} | {spec.micro_batch_size or spec.batch_size} |")
    table = BEGIN + "\n".join(rows) + "\n" + END
    pattern = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), flags=re.DOTALL)
    return pattern.sub(lambda _: table, PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    known = {} if "--all" in sys.argv else json.loads(SHIPPED.read_text(encoding="utf-8")) if SHIPPED.is_file() else {}
    counted = count(known)
    SHIPPED.write_text(json.dumps(counted, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sys.stdout.write(render(counted))
