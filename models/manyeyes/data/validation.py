"""Validation: is this snapshot fit to train on, and which of its samples are not?

Great Expectations has no notion of images or conversations, and wants its whole table in memory. So every sample is
looked at here, one row group in memory at a time, and becomes one row of facts: the profile. Great Expectations checks
the profile against a suite kept as JSON. Only ``critical`` expectations decide; ``warning`` and ``info`` are shown.
Samples that cannot be used go to the quarantine, each with its reason.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from pydantic import Field
from tokenizers import Tokenizer

from manyeyes.data.quarantine import QUARANTINE_FILE, QuarantinedSample, row_name, write_quarantine
from manyeyes.data.records import (
    PLACEHOLDER,
    Record,
    SampleProblem,
    find_checksum_problem,
    find_drawing_problem,
    find_id_problem,
    find_placeholder_problem,
    find_role_problem,
    measure_images,
)
from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import Snapshot
from manyeyes.data.validation_report import ExpectationOutcome, Severity, ValidationReport, render_validation
from manyeyes.errors import RecipeError, RecordError, SnapshotError, did_you_mean
from manyeyes.sources import open_pinned, split_pin
from manyeyes.storage import hash_file, new_file, write_file
from manyeyes.strict import StrictModel

_BATCH = 100


class FitCheck(Protocol):
    """Says why a recipe cannot train on a record that is whole."""

    def __call__(
        self, record: Record, *, dataset: str, row: int, image_sizes: Sequence[tuple[int, int]]
    ) -> SampleProblem | None:
        """The first thing in the way.

        Args:
            record: The record.
            dataset: Its data set.
            row: Its place there.
            image_sizes: Width and height of each image as decoded, in pixels.
        """
        ...


@dataclass(frozen=True)
class SampleFacts:
    """One row of the profile; the fields are its columns.

    Attributes:
        id: Of the record; ``<data set>#<row>`` where it has none.
        dataset: Its data set in the snapshot.
        row: Its place in the data set, from 0 over all shards in order.
        source: As the record says.
        is_eval: The data set is one that models are judged on.
        n_images: Images of the sample.
        width: Of the first image, in pixels; 0 without images.
        height: Of the first image, in pixels; 0 without images.
        aspect: Longer by shorter side of the first image; 1 without images.
        decode_ok: Every image can be decoded whole, and has its recorded width and height.
        n_turns: Turns, answers included.
        roles_ok: Human speaks first, human and gpt take turns, every question has an answer, no turn is empty.
        n_placeholders: ``<image>`` in all turns.
        placeholders_ok: As many placeholders as images, none in an answer.
        text_chars: Characters of all turns.
        answer_chars: Characters of all answers.
        n_tokens: Tokens of all turns, without chat template; -1 when no tokenizer was given.
        sha256: Of the first image's bytes; empty without images.
        sha256_ok: Every image has its recorded sha256.
        n_eval_images: Images of this sample that an evaluation set has too (exact sha256 of the bytes); 0 in the
            evaluation sets themselves.
        in_eval_set: ``n_eval_images`` is above 0.
        problem: Why the sample cannot be used; empty when it can.
    """

    id: str
    dataset: str
    row: int
    source: str
    is_eval: bool
    n_images: int
    width: int
    height: int
    aspect: float
    decode_ok: bool
    n_turns: int
    roles_ok: bool
    n_placeholders: int
    placeholders_ok: bool
    text_chars: int
    answer_chars: int
    n_tokens: int
    sha256: str
    sha256_ok: bool
    n_eval_images: int
    in_eval_set: bool
    problem: str


PROFILE_COLUMNS: tuple[str, ...] = tuple(field.name for field in fields(SampleFacts))


def build_profile(
    snapshot: Snapshot,
    datasets: Sequence[str],
    *,
    eval_datasets: Sequence[str],
    tokenizer_path: Path | None = None,
    find_misfit: FitCheck | None = None,
) -> pd.DataFrame:
    """Look at every sample of some data sets.

    Args:
        snapshot: Where they are.
        datasets: Their names; an evaluation set may be among them.
        eval_datasets: Data sets whose images must not be in the others.
        tokenizer_path: Folder with a tokenizer, to count tokens.
        find_misfit: Asked of whole records what a recipe's training would refuse.

    Returns:
        One row a sample, in order; the columns are the fields of ``SampleFacts``.

    Raises:
        SnapshotError: No such data set, or a shard that cannot be read.
    """
    eval_hashes = {
        digest for name in eval_datasets for record in _read_records(snapshot, name) for digest in _hash_images(record)
    }
    tokenizer = None if tokenizer_path is None else _read_tokenizer(tokenizer_path)
    rows: list[SampleFacts] = []
    # Decoding lets go of the interpreter lock, so threads help.
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for name in dict.fromkeys(datasets):
            is_eval, first = name in eval_datasets, 0
            look = partial(
                _look_at,
                dataset=name,
                is_eval=is_eval,
                eval_hashes=frozenset() if is_eval else frozenset(eval_hashes),
                count_tokens=None if tokenizer is None else partial(_count_tokens, tokenizer),
                find_misfit=find_misfit,
            )
            for batch in _in_batches(_read_records(snapshot, name)):
                numbers = range(first, first + len(batch))
                rows += pool.map(look, batch, numbers)
                first += len(batch)
    return pd.DataFrame([vars(row) for row in _mark_repeated_ids(rows)], columns=list(PROFILE_COLUMNS))


def _read_tokenizer(folder: Path) -> Tokenizer:
    # Transformers takes seconds to import, and most profiles count no tokens.
    from manyeyes.tokenizer_files import load_tokenizer

    backend: Tokenizer = load_tokenizer(folder).backend_tokenizer
    return backend


def _mark_repeated_ids(rows: list[SampleFacts]) -> Iterator[SampleFacts]:
    counts = Counter(row.id for row in rows)
    for row in rows:
        if counts[row.id] == 1 or row.problem:
            yield row
        else:
            yield SampleFacts(**{**vars(row), "problem": f"{counts[row.id]} samples have this id"})


@dataclass(frozen=True)
class _Unreadable:
    id: str
    problem: str


def _read_records(snapshot: Snapshot, dataset: str) -> Iterator[Record | _Unreadable]:
    reader = RecordReader(snapshot.shards(dataset), cached_groups=1)
    for index in range(len(reader)):
        try:
            yield reader.read(index)
        except RecordError as error:
            yield _Unreadable(id=reader.read_id(index), problem=f"{error.found}; needed: {error.needed}")


def _hash_images(record: Record | _Unreadable) -> list[str]:
    return [] if isinstance(record, _Unreadable) else [sha256(image.data).hexdigest() for image in record.images]


def _in_batches(records: Iterator[Record | _Unreadable]) -> Iterator[list[Record | _Unreadable]]:
    batch: list[Record | _Unreadable] = []
    for record in records:
        batch.append(record)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _count_tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def _look_at(
    record: Record | _Unreadable,
    row: int,
    *,
    dataset: str,
    is_eval: bool,
    eval_hashes: frozenset[str],
    count_tokens: Callable[[str], int] | None,
    find_misfit: FitCheck | None,
) -> SampleFacts:
    name = record.id if record.id.strip() else row_name(dataset, row)
    if isinstance(record, _Unreadable):
        return _without_facts(name, record.problem, dataset=dataset, row=row, is_eval=is_eval)
    images, turns = record.images, record.turns
    hashes = _hash_images(record)
    role_problem = find_role_problem(turns)
    placeholder_problem = find_placeholder_problem(turns, num_images=len(images))
    checksum_problem = find_checksum_problem(images)
    measured = measure_images(images)
    decoding_problem = measured if isinstance(measured, SampleProblem) else None
    problem = (
        find_id_problem(record.id)
        or role_problem
        or placeholder_problem
        or find_drawing_problem(turns)
        or checksum_problem
        or decoding_problem
    )
    if problem is None and find_misfit is not None and not isinstance(measured, SampleProblem):
        problem = find_misfit(record, dataset=dataset, row=row, image_sizes=measured)
    num_contaminated = sum(digest in eval_hashes for digest in hashes)
    width, height = (images[0].width, images[0].height) if images else (0, 0)
    return SampleFacts(
        id=name,
        dataset=dataset,
        row=row,
        source=record.source,
        is_eval=is_eval,
        n_images=len(images),
        width=width,
        height=height,
        aspect=max(width, height) / min(width, height) if width and height else 1.0,
        decode_ok=decoding_problem is None,
        n_turns=len(turns),
        roles_ok=role_problem is None,
        n_placeholders=sum(turn.text.count(PLACEHOLDER) for turn in turns),
        placeholders_ok=placeholder_problem is None,
        text_chars=sum(len(turn.text) for turn in turns),
        answer_chars=sum(len(turn.text) for turn in turns if turn.speaker == "gpt"),
        n_tokens=-1 if count_tokens is None else sum(count_tokens(turn.text) for turn in turns),
        sha256=hashes[0] if hashes else "",
        sha256_ok=checksum_problem is None,
        n_eval_images=num_contaminated,
        in_eval_set=num_contaminated > 0,
        problem="" if problem is None else str(problem),
    )


def _without_facts(name: str, problem: str, *, dataset: str, row: int, is_eval: bool) -> SampleFacts:
    return SampleFacts(
        id=name,
        dataset=dataset,
        row=row,
        source="",
        is_eval=is_eval,
        n_images=0,
        width=0,
        height=0,
        aspect=1.0,
        decode_ok=False,
        n_turns=0,
        roles_ok=False,
        n_placeholders=0,
        placeholders_ok=False,
        text_chars=0,
        answer_chars=0,
        n_tokens=-1,
        sha256="",
        sha256_ok=False,
        n_eval_images=0,
        in_eval_set=False,
        problem=problem,
    )


_EXAMPLES = 5


def validate_snapshot(
    snapshot: Snapshot,
    *,
    datasets: Sequence[str],
    eval_datasets: Sequence[str],
    suite: str,
    out_dir: Path,
    tokenizer_path: Path | None = None,
    find_misfit: FitCheck | None = None,
) -> ValidationReport:
    """Look at every sample, check the suite, and write the report.

    Writes ``profile.parquet``, ``validation.json``, ``validation.html`` and ``quarantine.jsonl``. A failed verdict is
    not an error here: the caller decides what it means.

    Args:
        snapshot: What to check.
        datasets: Data sets to train on.
        eval_datasets: Data sets that models are judged on; checked too.
        suite: A suite that ships with the package, or the path of a JSON file.
        out_dir: Folder for the files; made when missing.
        tokenizer_path: Folder with a tokenizer, to count tokens in the profile.
        find_misfit: Asked of whole records what a recipe's training would refuse.

    Raises:
        RecipeError: No such suite, or not a suite.
        SnapshotError: A data set or shard is missing, or a shard is not the one of the manifest.
        StorageError: No space or no permission.
    """
    text = read_suite(suite)
    expectations = parse_suite(text, name=suite)
    names = list(dict.fromkeys([*datasets, *eval_datasets]))
    for name in names:
        _check_shards(snapshot, name)
    profile = build_profile(
        snapshot, names, eval_datasets=eval_datasets, tokenizer_path=tokenizer_path, find_misfit=find_misfit
    )
    outcomes = check_profile(profile, expectations)
    bad = profile[profile["problem"] != ""]
    report = ValidationReport(
        verdict="failed" if any(o.severity == "critical" and not o.success for o in outcomes) else "passed",
        data_md5=snapshot.md5,
        suite=suite,
        suite_sha256=hashlib.sha256(text.encode()).hexdigest(),
        datasets={name: int((profile["dataset"] == name).sum()) for name in names},
        eval_datasets=tuple(eval_datasets),
        rows=len(profile),
        quarantined=len(bad),
        contaminated_images=int(profile["n_eval_images"].sum()),
        expectations=tuple(outcomes),
    )
    quarantine = [
        QuarantinedSample(dataset=row.dataset, row=row.row, id=row.id, reason=row.problem)
        for row in bad.itertuples(index=False)
    ]
    with new_file(out_dir / "profile.parquet") as file:
        profile.to_parquet(file, index=False)
    write_quarantine(out_dir / QUARANTINE_FILE, quarantine)
    page = render_validation(report, profile=profile, quarantine=quarantine, snapshot=snapshot)
    write_file(out_dir / "validation.html", page)
    write_file(out_dir / "validation.json", report.model_dump_json(indent=2) + "\n")
    return report


def list_suites() -> list[str]:
    """Names of the suites that ship with the package, sorted."""
    files = resources.files("manyeyes").joinpath("data", "suites").iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def read_suite(name_or_path: str) -> str:
    """The JSON text of a suite.

    Raises:
        RecipeError: No such suite.
    """
    path = Path(split_pin(name_or_path)[0])
    if path.suffix == ".json":
        if not path.is_file():
            raise RecipeError(f'data.suite is "{name_or_path}"', "no such file", "Check the path.")
        return open_pinned(name_or_path).read_text(encoding="utf-8")
    names = list_suites()
    if name_or_path not in names:
        raise RecipeError(
            f'data.suite is "{name_or_path}"',
            f"the suites are {', '.join(names)}, or the path of a .json file",
            f"{did_you_mean(name_or_path, names)}Correct the recipe.",
        )
    return resources.files("manyeyes").joinpath("data", "suites", f"{name_or_path}.json").read_text(encoding="utf-8")


class SuiteExpectation(StrictModel):
    """One expectation of a suite's JSON file."""

    type: str = Field(description="Of Great Expectations, for instance expect_column_values_to_be_unique.")
    kwargs: dict[str, Any] = Field(description="Its arguments; columns are those of the profile.")
    severity: Severity = Field(description="Only critical ones decide the verdict.")
    meta: dict[str, str] = Field(description="name: unique in the suite. explanation: a sentence for the report.")

    def columns(self) -> list[str]:
        """Columns that it reads: its own, and that of a plain row condition."""
        condition = self.kwargs.get("row_condition")
        of_condition = condition.get("column", {}).get("name") if isinstance(condition, dict) else None
        return [column for column in (self.kwargs.get("column"), of_condition) if column is not None]


class Suite(StrictModel):
    """A suite's JSON file, as Great Expectations reads it."""

    name: str = Field(description="Of the suite.")
    meta: dict[str, str] = Field(default={}, description="For people.")
    expectations: tuple[SuiteExpectation, ...] = Field(min_length=1, description="In the report's order.")


def parse_suite(text: str, *, name: str) -> Suite:
    """Check a suite's JSON.

    Raises:
        RecipeError: Not a suite, or an expectation without name or explanation, or a name used twice.
    """
    do = "See the suite conversations in manyeyes/data/suites."
    try:
        suite = Suite.model_validate_json(text)
    except ValueError as error:
        raise RecipeError(f'suite "{name}": {error}', "a suite of expectations", do) from error
    names = [expectation.meta.get("name", "") for expectation in suite.expectations]
    if "" in names or len(set(names)) != len(names):
        raise RecipeError(f'suite "{name}" has the names {names}', "meta.name in each, all different", do)
    return suite


def check_profile(profile: pd.DataFrame, suite: Suite) -> list[ExpectationOutcome]:
    """Run the suite over a profile.

    Args:
        profile: As ``build_profile`` makes it.
        suite: As ``parse_suite`` reads it.

    Returns:
        One outcome for each expectation, in the suite's order. A missing column is an unmet expectation that says so.

    Raises:
        RecipeError: Great Expectations does not know an expectation, or refuses its arguments.
    """
    missing = {
        expectation.meta["name"]: column
        for expectation in suite.expectations
        for column in expectation.columns()
        if column not in profile.columns
    }
    checkable = [expectation for expectation in suite.expectations if expectation.meta["name"] not in missing]
    results = _run_great_expectations(profile, checkable)
    outcomes = []
    for expectation in suite.expectations:
        name = expectation.meta["name"]
        if name in missing:
            outcomes.append(_explain_missing_column(expectation, missing[name], profile))
        else:
            outcomes.append(_as_outcome(expectation, results[name]))
    return outcomes


def _run_great_expectations(
    profile: pd.DataFrame, expectations: Sequence[SuiteExpectation]
) -> dict[str, Mapping[str, Any]]:
    if not expectations:
        return {}
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig
    from great_expectations.exceptions import GreatExpectationsError
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("profile").add_dataframe_asset("profile")
    batches = asset.add_batch_definition_whole_dataframe("whole")
    built = []
    for expectation in expectations:
        # One by one: a suite made from dicts drops an expectation that it does not know, with a line in the log.
        try:
            built.append(ExpectationConfiguration(**expectation.model_dump()).to_domain_obj())
        except (GreatExpectationsError, ValueError, TypeError) as error:
            raise RecipeError(
                f'expectation "{expectation.meta["name"]}" ({expectation.type}) is refused: {error}',
                "an expectation and arguments that Great Expectations knows",
                "Correct its type and kwargs in the suite.",
            ) from error
    suite = context.suites.add(gx.ExpectationSuite(name="profile", expectations=built))
    definition = gx.ValidationDefinition(name="profile", data=batches, suite=suite)
    run = context.validation_definitions.add(definition).run(
        batch_parameters={"dataframe": profile},
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["id"]},
    )
    # Great Expectations moves failed ones to the front, so they are found by name.
    return {result.expectation_config.meta["name"]: result.to_json_dict() for result in run.results}


def _as_outcome(expectation: SuiteExpectation, result: Mapping[str, Any]) -> ExpectationOutcome:
    facts = result.get("result") or {}
    explanation = expectation.meta.get("explanation", expectation.type)
    raised = _find_exception(result.get("exception_info") or {})
    if raised is not None:
        explanation = f"Could not be checked: {raised}. ({explanation})"
    index = facts.get("unexpected_index_list") or []
    count = int(facts.get("unexpected_count") or 0)
    return ExpectationOutcome(
        name=expectation.meta["name"],
        severity=expectation.severity,
        success=bool(result["success"]),
        unexpected_count=count,
        unexpected_percent=float(facts.get("unexpected_percent") or 0.0),
        examples=tuple(str(row["id"]) for row in index[:_EXAMPLES]),
        explanation=explanation,
    )


def _find_exception(info: Mapping[str, Any]) -> str | None:
    """The first line of an exception, wherever Great Expectations put it; its traceback helps nobody."""
    if info.get("raised_exception"):
        return str(info.get("exception_message") or "unknown reason").splitlines()[0].rstrip(".")
    for value in info.values():
        if isinstance(value, Mapping) and (found := _find_exception(value)) is not None:
            return found
    return None


def _explain_missing_column(expectation: SuiteExpectation, column: str, profile: pd.DataFrame) -> ExpectationOutcome:
    columns = [str(name) for name in profile.columns]
    return ExpectationOutcome(
        name=expectation.meta["name"],
        severity=expectation.severity,
        success=False,
        unexpected_count=0,
        unexpected_percent=0.0,
        examples=(),
        explanation=f'Could not be checked: the profile has no column "{column}". {did_you_mean(column, columns)}'
        f"Its columns are {', '.join(columns)}.",
    )


def _check_shards(snapshot: Snapshot, dataset: str) -> None:
    for shard, path in zip(snapshot.dataset(dataset).shards, snapshot.shards(dataset), strict=True):
        found = hash_file(path)
        if found != shard.sha256:
            raise SnapshotError(
                f"shard {path} has sha256 {found}",
                f"{shard.sha256}, as the manifest says",
                "Delete the snapshot's folder and run again to fetch it anew, or build it again.",
            )
