"""What every later step starts from: the recipe, the snapshot, and the folders of this machine."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import yaml

from manyeyes.data.snapshot import Snapshot, open_folder, open_snapshot, read_default_remote, read_dvc_file
from manyeyes.errors import PipelineError, SnapshotError
from manyeyes.recipe import STAGE_NAMES, EvaluationSpec, Recipe, StageSpec, write_line
from manyeyes.recipe.model import MAX_EPOCHS, PART, Part
from manyeyes.recipe.partial import one_encoder, read_fields, take_fields
from manyeyes.storage import cache_dir as cache_dir

_MARKER = "absent.json"
_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


_TRIAL = ("name", "seed", "model", "stages", "evaluation")
_SCORE = ("name", "model.chat", "evaluation")

# What each step reads of the recipe; it is given nothing else. Whoever changes what a step reads changes its row.
SLICES: dict[str, tuple[str, ...]] = {
    "validate_data": (
        *("seed", "data", "model.preprocess", "model.shared", "model.fusion", "model.projector", "model.reinjection"),
        *("model.layout", "model.language_model", "model.chat"),
        *(f"model.encoders.{name}" for name in ("name", "encoder", "image_size", "fill", "fit", "small")),
        *(
            f"stages.{stage}.{name}"
            for stage in STAGE_NAMES
            for name in (
                *("epochs", "too_long", "template", "fit", "model"),
                *(f"mixture.{part}" for part in ("dataset", "turns", "order", "image_dropout", "questions")),
            )
        ),
        "stages.prealign.encoders",
    ),
    "prealign_encoder": ("seed", "model", "stages.prealign"),
    "pretrain_projector": ("seed", "model", "stages.pretrain", "stages.prealign.encoders"),
    "sft": ("seed", "model", "stages.sft", "stages.pretrain.model", "stages.prealign.encoders"),
    "evaluate": _SCORE,
    # Seed and stages are its lineage: by them register knows the recipe that a bundle was made with.
    "export_onnx": (
        *("name", "seed", "model", "stages", "export"),
        *(f"evaluation.{name}" for name in ("benchmarks", "max_new_tokens", "prompts", "variants", "multiple_choice")),
    ),
    "gate": (*_SCORE, "gate"),
    "register": tuple(Recipe.model_fields),
    "plan_evaluation": (*_SCORE, "registry.model"),
    "fetch_model": (),
    "score_benchmark": (
        *("name", "model.chat"),
        *(f"evaluation.{name}" for name in EvaluationSpec.model_fields if name != "benchmarks"),
    ),
    "merge_scorecards": _SCORE,
    "start_search": _TRIAL,
    "advance_search": ("seed",),
    "plan_ablation": _TRIAL,
    "compare_trials": _TRIAL,
    "train_trial": _TRIAL,
}
# The first steps of pipelines: they pin recipe, data and code, and say so in their report's metadata.
PINNING_STEPS = ("preflight", "plan_evaluation", "plan_curation", "plan_validation")
# plan_evaluation knows which benchmarks they are about.
EVALUATION_STEPS = ("fetch_model", "score_benchmark", "merge_scorecards")
# It keeps the recipe with the version, whole.
_WHOLE = "register"
_WITHOUT_DATA = {"fetch_model", "start_search", "advance_search", "plan_ablation", "compare_trials"}


@dataclass(frozen=True)
class Pinned:
    """What a step starts from; as text, it is the one parameter that every step has.

    Attributes:
        recipe: What to do: the whole recipe, or the slice of one step.
        data_md5: Snapshot.
        data_remote: A folder, ``s3://`` or ``hub:OWNER/NAME@COMMIT`` that holds it.
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

    def of(self, step: str, *, encoder: str = "") -> Pinned:
        """What one step starts from: the fields that its row of ``SLICES`` names, and data only where it reads some.

        Args:
            step: A row of ``SLICES``.
            encoder: For ``prealign_encoder``, the encoder that is trained; empty where there is none to train.
        """
        if step not in SLICES:
            raise RuntimeError(f"{step} has no row in SLICES: add one with the fields of the recipe that it reads")
        recipe, paths = self.recipe, SLICES[step]
        if step == _WHOLE:
            return self
        if step == "validate_data":
            recipe = _for_validation(recipe)
        elif step == "export_onnx":
            recipe = _for_export(recipe)
        elif step == "prealign_encoder":
            recipe, paths = (one_encoder(recipe, encoder), paths) if encoder else (recipe, ())
        sliced = replace(self, recipe=take_fields(recipe, paths, reader=step))
        return replace(sliced, data_md5="", data_remote="") if step in _WITHOUT_DATA else sliced

    def text(self) -> str:
        """In one line, without what has its default; ``parse_pinned`` reads it back."""
        part: Part | None = self.recipe.__dict__.get(PART)
        facts = {"data_md5": self.data_md5, "data_remote": self.data_remote, "step": part.reader if part else ""}
        tree = self.recipe.model_dump(mode="json", exclude_defaults=True)
        given = {name: value for name, value in facts.items() if value}
        return write_line({"recipe": tree, "code_digest": self.code_digest, **given})


def parse_pinned(text: str) -> Pinned:
    """Read ``Pinned.text`` back.

    Raises:
        PipelineError: Not such a text.
    """
    try:
        facts = {"data_md5": "", "data_remote": "", "step": _WHOLE, **yaml.load(text, Loader=_LOADER)}
        recipe, step = facts.pop("recipe"), facts.pop("step")
        whole = step == _WHOLE
        return Pinned(
            Recipe.model_validate(recipe) if whole else read_fields(recipe, SLICES[step], reader=step), **facts
        )
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise PipelineError(
            f"pinned is {text[:60]!r} ({error})",
            "recipe, data and code as one text",
            "Pass on what preflight gave.",
        ) from error


def work_dir() -> Path:
    """Where running checkpoints lie: ``MANYEYES_WORKDIR``, ``runs/work`` by default."""
    return Path(os.environ.get("MANYEYES_WORKDIR") or "runs/work")


def _for_validation(recipe: Recipe) -> Recipe:
    """The recipe with what validation draws from other fields: the data sets to compare with, the epochs to try."""
    stages: dict[str, StageSpec] = {
        name: stage.model_copy(update={"epochs": _tried_epochs(stage)}) for name, stage in recipe.present_stages()
    }
    compared = [name for name in compared_datasets(recipe) if name not in recipe.data.eval_datasets]
    contamination = recipe.data.contamination.model_copy(update={"benchmarks": tuple(compared)})
    data = recipe.data.model_copy(update={"contamination": contamination})
    return recipe.model_copy(update={"stages": recipe.stages.model_copy(update=stages), "data": data})


def _tried_epochs(stage: StageSpec) -> int:
    """Epochs whose draws validation tries: 4, 8, 16 and so on, so that one epoch more seldom validates anew."""
    tried = max(4, 1 << (stage.epochs - 1).bit_length())
    return min(tried, MAX_EPOCHS) if any(part.draws for part in stage.mixture) else 1


def _for_export(recipe: Recipe) -> Recipe:
    """The recipe with the one benchmark on which bundle and torch are compared."""
    evaluation = recipe.evaluation
    first = evaluation.benchmarks[0]
    variants = {name: variant for name, variant in evaluation.variants.items() if name == first}
    return recipe.model_copy(
        update={"evaluation": evaluation.model_copy(update={"benchmarks": (first,), "variants": variants})}
    )


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
