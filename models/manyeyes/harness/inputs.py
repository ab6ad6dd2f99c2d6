"""What every later step starts from: the recipe, the snapshot, and the folders of this machine."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from manyeyes.data.snapshot import Snapshot, open_folder, open_snapshot, read_default_remote, read_dvc_file
from manyeyes.errors import PipelineError, SnapshotError
from manyeyes.recipe import Recipe, parse_recipe
from manyeyes.storage import cache_dir as cache_dir

_MARKER = "absent.json"


@dataclass(frozen=True)
class Pinned:
    """What a step starts from; as text, it is the one parameter that every step has.

    Attributes:
        recipe: What to do.
        data_md5: Snapshot.
        data_remote: A folder or ``s3://`` that holds it.
        code_digest: Digest of the image, or of the library's source; with it an edited library is not answered from the
            cache.
    """

    recipe: Recipe
    data_md5: str
    data_remote: str
    code_digest: str

    @cached_property
    def snapshot(self) -> Snapshot:
        """The snapshot, fetched when it is first asked for.

        Raises:
            SnapshotError: The remote lacks the snapshot, or holds a damaged one.
        """
        return open_snapshot(md5=self.data_md5, remote=self.data_remote, cache_dir=cache_dir())

    def text(self) -> str:
        """Sorted, compact JSON; ``parse_pinned`` reads it back."""
        facts = {name: getattr(self, name) for name in ("data_md5", "data_remote", "code_digest")}
        facts["recipe"] = self.recipe.model_dump(mode="json")
        return json.dumps(facts, sort_keys=True, separators=(",", ":"))


def parse_pinned(text: str) -> Pinned:
    """Read ``Pinned.text`` back.

    Raises:
        PipelineError: Not such a text.
        RecipeError: Its recipe is none.
    """
    try:
        facts = json.loads(text)
        recipe = facts.pop("recipe")
        return Pinned(recipe=parse_recipe(json.dumps(recipe)), **facts)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PipelineError(
            f"pinned is {text[:60]!r} ({error})",
            "recipe, data and code as one JSON text",
            "Pass on what resolve_data gave.",
        ) from error


def work_dir() -> Path:
    """Where running checkpoints lie: ``MANYEYES_WORKDIR``, ``runs/work`` by default."""
    return Path(os.environ.get("MANYEYES_WORKDIR") or "runs/work")


def locate_data(data_md5: str, data_remote: str) -> tuple[str, str]:
    """Snapshot and remote, from the checkout where the parameters leave them out.

    Raises:
        SnapshotError: Neither a parameter nor a checkout says it.
    """
    here = Path()
    if not data_md5 and not (here / "data.dvc").is_file():
        raise SnapshotError(
            f"data_md5 is empty and {here.resolve()} has no data.dvc",
            "the md5 of a snapshot",
            "Pass data_md5 (outs[0].md5 in data.dvc), or run in a checkout.",
        )
    return data_md5 or read_dvc_file(here / "data.dvc").md5, data_remote or read_default_remote(here)


def open_data(data_folder: str, *, data_md5: str, data_remote: str) -> Snapshot:
    """A snapshot by folder, by md5 and remote, or as the checkout says.

    Raises:
        SnapshotError: It is not there, or damaged.
    """
    if data_folder:
        return open_folder(Path(data_folder))
    md5, remote = locate_data(data_md5, data_remote)
    return open_snapshot(md5=md5, remote=remote, cache_dir=cache_dir())


def mark_absent(folder: Path, reason: str) -> None:
    """Leave a marker in place of an artifact that this recipe does not make.

    kfp can neither loop over nothing nor skip a task whose artifact another one takes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).write_text(json.dumps({"reason": reason}) + "\n", encoding="utf-8")


def is_absent(folder: Path) -> bool:
    """Whether ``mark_absent`` left its marker there."""
    return (folder / _MARKER).is_file()


def training_datasets(recipe: Recipe) -> list[str]:
    """Data sets that any stage trains on, each once, in order."""
    names = [part.dataset for _, stage in recipe.present_stages() for part in stage.mixture]
    return list(dict.fromkeys(names))


def compared_datasets(recipe: Recipe) -> list[str]:
    """Data sets that training data is compared with: those that the recipe names.

    Where it names none and its gate has a rule on contamination: the data sets that it is judged on.
    """
    named = [*recipe.data.eval_datasets, *recipe.data.contamination.benchmarks]
    if named or not any(rule.rule == "contamination" for rule in recipe.gate):
        return named
    from manyeyes.evaluation.benchmarks import BENCHMARKS

    return [BENCHMARKS[name].dataset for name in recipe.evaluation.benchmarks if name in BENCHMARKS]
