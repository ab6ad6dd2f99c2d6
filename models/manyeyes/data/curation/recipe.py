"""A curation recipe: what is drawn from which data, as YAML; errors are those of model recipes.

Three come with the package: Cambrian-1's 7M out of its 10M, LLaVA's CC3M by noun phrases, and duplicates alone.
"""

from __future__ import annotations

import fnmatch
import hashlib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, get_args

import pydantic
from pydantic import Field, model_validator

from manyeyes.data.contamination.findings import Thresholds
from manyeyes.data.sources_table import Category, find_source
from manyeyes.errors import RecipeError, did_you_mean
from manyeyes.recipe.loading import explain_invalid, read_recipe_file, read_yaml
from manyeyes.strict import StrictModel

UNSORTED = "unsorted"
Count = Annotated[int, Field(ge=1)]


class InputSpec(StrictModel):
    """Data sets of one snapshot."""

    snapshot: str | None = Field(
        default=None, description="Its folder, .dvc file or md5; without one, that of --snapshot."
    )
    datasets: tuple[str, ...] | None = Field(
        default=None, description="Data sets of it; all of layout records by default."
    )


class SourceSpec(StrictModel):
    """What is said of the records of some sources."""

    category: str | None = Field(
        default=None,
        min_length=1,
        description="The ratio is among categories; that of the table of sources by default.",
    )
    cap: Count | None = Field(default=None, description="Most samples of each of these sources, in place of cap.")
    prompt: str | None = Field(
        default=None,
        min_length=1,
        description="Sentence about the answer's format, put below each question that has none yet; with "
        "answer_formats the table's by default.",
    )
    letter_prompt: str | None = Field(
        default=None,
        min_length=1,
        description="The same where the answer is an option's letter; prompt by default.",
    )


class Range(StrictModel):
    """From where to where; an end that is missing is open."""

    min: float | None = Field(default=None, ge=0)
    max: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check_order(self) -> Range:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min up to max; {self.min:g} is above {self.max:g}")
        return self


class FilterSpec(StrictModel):
    """What a sample must be like."""

    question_chars: Range = Field(default=Range(), description="Characters of the longest question.")
    answer_chars: Range = Field(default=Range(), description="Characters of all answers.")
    text_chars: Range = Field(default=Range(), description="Characters of all turns.")
    pairs: Range = Field(default=Range(), description="Questions with their answers.")
    images: Range = Field(default=Range(), description="Images; min 1 leaves out samples of text alone.")
    side: Range = Field(default=Range(), description="Pixels of the shorter and of the longer side of every image.")
    aspect: Range = Field(default=Range(), description="Longer by shorter side of every image.")
    scripts: tuple[str, ...] = Field(
        default=(),
        description="Scripts of writing as Unicode calls them, for instance latin, greek, cjk; any by default.",
    )
    script_share: float = Field(
        default=0.9, gt=0, le=1, description="Least share of a sample's letters that is of these scripts."
    )


class NearSpec(StrictModel):
    """From where on two samples are the same."""

    words: Literal["same", "any"] = Field(
        default="same",
        description="same: their turns have the same words too. any: the images decide, which fits captions.",
    )
    radius: int = Field(default=7, ge=0, le=7, description="Most bits in which two dHashes of 64 bits differ.")
    max_difference: float = Field(
        default=16.0, ge=0, le=255, description="Largest mean absolute difference at 64x64, in levels of 255."
    )
    min_entropy: float = Field(
        default=3.0, ge=0, le=8, description="Bits a pixel below which only the bytes of images are compared."
    )


class DuplicateSpec(StrictModel):
    """Which samples are there twice."""

    exact: bool = Field(default=True, description="The same bytes of images and the same turns.")
    near: NearSpec | None = Field(default=None, description="Near duplicates too; every image is decoded for them.")


class BenchmarkSpec(StrictModel):
    """Samples that benchmarks hold are left out."""

    names: tuple[str, ...] = Field(
        min_length=1, description="Data sets of an input's snapshot, or Parquet files or folders."
    )
    thresholds: Thresholds = Field(default=Thresholds(), description="From where on two things are the same.")


class NounPhraseSpec(StrictModel):
    """LLaVA's filter of captions: rare things are kept, frequent ones thinned out (arXiv:2304.08485, appendix E)."""

    sources: tuple[str, ...] = Field(min_length=1, description="Of captions; * stands for any letters.")
    min_count: Count = Field(default=3, description="Phrases of fewer captions are skipped.")
    max_count: Count = Field(default=100, description="Captions taken of each phrase at most.")

    def fits(self, source: str) -> bool:
        """Whether the records of a source are among the captions."""
        return any(fnmatch.fnmatchcase(source, pattern) for pattern in self.sources)


class CurationRecipe(StrictModel):
    """What is drawn from which data."""

    name: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", description="The new data set is called <name>-train.")
    description: str = Field(default="", description="For people.")
    seed: int = Field(default=0, ge=0, description="Another seed draws other samples.")
    inputs: tuple[InputSpec, ...] = Field(default=(InputSpec(),), min_length=1, description="What is drawn from.")
    sources: dict[str, SourceSpec] = Field(
        default={},
        description="By the records' source; * stands for any letters, and the first that fits counts.",
    )
    answer_formats: bool = Field(
        default=False,
        description="Whether questions get the sentence about the answer's format that Cambrian-1 gave their source.",
    )
    filters: FilterSpec = Field(default=FilterSpec(), description="What a sample must be like.")
    duplicates: DuplicateSpec = Field(default=DuplicateSpec(), description="Which samples are there twice.")
    benchmarks: BenchmarkSpec | None = Field(default=None, description="Samples that these hold are left out.")
    noun_phrases: NounPhraseSpec | None = Field(default=None, description="Captions are thinned out by what they name.")
    cap: Count | None = Field(default=None, description="Most samples of one source: Cambrian-1's t.")
    ratio: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="Parts of each category, in percent or any other unit; all that there is by default."
    )
    total: Count | None = Field(default=None, description="Most samples altogether.")

    @model_validator(mode="after")
    def _check_categories(self) -> CurationRecipe:
        named = [spec.category for spec in self.sources.values() if spec.category is not None]
        known = list(dict.fromkeys([*named, *get_args(Category), UNSORTED]))
        for name in self.ratio:
            if name not in known:
                raise ValueError(
                    f'ratio names "{name}", and categories are {", ".join(known)}. {did_you_mean(name, known)}'
                )
        missing = [name for name in dict.fromkeys(named) if self.ratio and name not in self.ratio]
        if missing:
            raise ValueError(f"a ratio for every category of sources; {', '.join(missing)} has none")
        return self

    def canonical_json(self) -> str:
        """Every default filled in."""
        return self.model_dump_json()

    @property
    def digest(self) -> str:
        """sha256 of ``canonical_json``."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def source(self, name: str) -> SourceSpec:
        """What holds for the records of a source: what the recipe says, else what the table of sources says."""
        spec = next(
            (spec for pattern, spec in self.sources.items() if fnmatch.fnmatchcase(name, pattern)), SourceSpec()
        )
        known = find_source(name)
        changes: dict[str, str] = {}
        if spec.category is None:
            changes["category"] = UNSORTED if known is None else known.category
        if spec.prompt is None and self.answer_formats and known is not None and known.answer_format:
            changes["prompt"] = known.answer_format
            if spec.letter_prompt is None and known.letter_format:
                changes["letter_prompt"] = known.letter_format
        return spec.model_copy(update=changes)

    def category(self, source: str) -> str:
        """The category of a source."""
        return self.source(source).category or UNSORTED


def list_curation_recipes() -> list[str]:
    """Names of the curation recipes that ship with the package, sorted."""
    files = resources.files("manyeyes").joinpath("data", "curation", "recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_curation_recipe(name_or_path: str) -> CurationRecipe:
    """Read and check a curation recipe.

    Args:
        name_or_path: One that ships with the package, or the path of a YAML file.

    Raises:
        RecipeError: No such recipe, not YAML, an unknown field, or a wrong value.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return read_curation_text(read_recipe_file(path), where=str(path))
    names = list_curation_recipes()
    if name_or_path not in names:
        raise RecipeError(
            f'curation recipe is "{name_or_path}"',
            f"the path of a .yaml file, or one of {', '.join(names)}",
            did_you_mean(name_or_path, names) or "Fields: docs/curation.md",
        )
    text = resources.files("manyeyes").joinpath("data", "curation", "recipes", f"{name_or_path}.yaml")
    return read_curation_text(text.read_text(encoding="utf-8"), where=name_or_path)


def read_curation_text(text: str, *, where: str = "curation recipe") -> CurationRecipe:
    """Read a curation recipe that travels as text.

    Args:
        text: YAML.
        where: What messages call it.

    Raises:
        RecipeError: As for ``load_curation_recipe``.
    """
    tree = read_yaml(text, where=where)
    if not isinstance(tree, dict):
        raise RecipeError(f"{where} holds {type(tree).__name__}", "a mapping with a name", "See: docs/curation.md")
    try:
        return CurationRecipe.model_validate(tree)
    except pydantic.ValidationError as error:
        raise explain_invalid(error, where=where, model=CurationRecipe, see="Fields: docs/curation.md") from error
