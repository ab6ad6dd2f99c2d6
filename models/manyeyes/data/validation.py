"""Validation: is this snapshot fit to train on, and which of its samples are not?

Great Expectations has no notion of images or conversations, and wants its whole table in memory. So every sample is
looked at, one row group in memory at a time, and becomes one row of facts: the profile. Great Expectations checks it
against a suite kept as JSON; it gets the columns that the suite names, about 50 bytes a sample. Only ``critical``
expectations decide; ``warning`` and ``info`` are shown. Samples that cannot be used go to the quarantine, each with
its reason.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from manyeyes.data.profile import PROFILE_COLUMNS, FitCheck, Progress, read_columns, take_rows, write_profile
from manyeyes.data.quarantine import QUARANTINE_FILE, QuarantinedSample, write_quarantine
from manyeyes.data.snapshot import Snapshot
from manyeyes.data.validation_report import ExpectationOutcome, Severity, ValidationReport, render_validation
from manyeyes.errors import RecipeError, did_you_mean
from manyeyes.sources import open_pinned, split_pin
from manyeyes.storage import write_file
from manyeyes.strict import StrictModel

_EXAMPLES = 5
_TOGETHER = 200_000
"""Samples up to which all expectations are checked at once: quicker, and Great Expectations keeps what each found."""


def validate_snapshot(
    snapshot: Snapshot,
    *,
    datasets: Sequence[str],
    eval_datasets: Sequence[str],
    suite: str,
    out_dir: Path,
    tokenizer_path: Path | None = None,
    find_misfit: FitCheck | None = None,
    misfit_key: str = "",
    cache_dir: Path | None = None,
    progress: Progress | None = None,
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
        misfit_key: What its answers depend on, as ``write_profile`` takes it.
        cache_dir: Where the facts of shards are kept, so that the next snapshot is checked by the shards that changed.
        progress: Called with a sentence and the share that is done.

    Raises:
        RecipeError: No such suite, or not a suite.
        SnapshotError: A data set or shard is missing, or a shard is not the one of the manifest.
        StorageError: No space or no permission.
    """
    text = read_suite(suite)
    expectations = parse_suite(text, name=suite)
    names = list(dict.fromkeys([*datasets, *eval_datasets]))
    profile = out_dir / "profile.parquet"
    write_profile(
        snapshot,
        names,
        eval_datasets=eval_datasets,
        out=profile,
        cache_dir=cache_dir,
        tokenizer_path=tokenizer_path,
        find_misfit=find_misfit,
        misfit_key=misfit_key,
        progress=progress,
    )
    if progress is not None:
        progress("asking Great Expectations", 1.0)
    outcomes = [
        outcome
        for part in _cut(expectations, rows=pq.read_metadata(profile).num_rows)
        for outcome in check_profile(
            _read_checked(profile, part), part, name_rows=lambda rows: take_rows(profile, rows, ["id"])["id"].tolist()
        )
    ]
    facts = read_columns(profile, ["dataset", "problem", "n_eval_images"])
    report = ValidationReport(
        verdict="failed" if any(o.severity == "critical" and not o.success for o in outcomes) else "passed",
        data_md5=snapshot.md5,
        suite=suite,
        suite_sha256=hashlib.sha256(text.encode()).hexdigest(),
        datasets={name: int((facts["dataset"] == name).sum()) for name in names},
        eval_datasets=tuple(eval_datasets),
        rows=len(facts),
        quarantined=int((facts["problem"] != "").sum()),
        contaminated_images=int(facts["n_eval_images"].sum()),
        expectations=tuple(outcomes),
    )
    del facts
    write_quarantine(out_dir / QUARANTINE_FILE, _read_bad(profile))
    write_file(out_dir / "validation.html", render_validation(report, profile=profile, snapshot=snapshot))
    write_file(out_dir / "validation.json", report.model_dump_json(indent=2) + "\n")
    return report


def _cut(suite: Suite, *, rows: int) -> list[Suite]:
    """A suite in parts that are checked one after the other, so that fewer columns of many samples are in memory."""
    if rows <= _TOGETHER:
        return [suite]
    return [suite.model_copy(update={"expectations": (expectation,)}) for expectation in suite.expectations]


def _read_bad(profile: Path) -> Iterator[QuarantinedSample]:
    with pq.ParquetFile(profile) as file:
        for batch in file.iter_batches(columns=["dataset", "row", "id", "problem"]):
            for bad in batch.filter(pc.not_equal(batch.column("problem"), "")).to_pylist():
                yield QuarantinedSample(dataset=bad["dataset"], row=bad["row"], id=bad["id"], reason=bad["problem"])


_UNIQUE = "expect_column_values_to_be_unique"
# What is asked of a column's values alone; of their text, whether two are equal, or one is of some.
_BY_VALUE = (
    *(_UNIQUE, "expect_column_values_to_be_in_set", "expect_column_values_to_not_be_in_set"),
    *("expect_column_values_to_be_between", "expect_table_row_count_to_be_between"),
)
_ARGUMENTS = {"column", "value_set", "min_value", "max_value", "strict_min", "strict_max", "mostly", "row_condition"}


def _read_checked(profile: Path, suite: Suite) -> pd.DataFrame:
    """The columns that a suite asks about; the whole profile where it asks otherwise than by value."""
    uses: dict[str, set[str]] = defaultdict(set)
    for expectation in suite.expectations:
        condition = expectation.kwargs.get("row_condition")
        plain = condition is None or (isinstance(condition, dict) and condition.get("type") == "comparison")
        if expectation.type not in _BY_VALUE or not plain or not set(expectation.kwargs) <= _ARGUMENTS:
            return pd.read_parquet(profile)
        for column in expectation.columns():
            uses[column].add(expectation.type if column == expectation.kwargs.get("column") else "condition")
    hashed = [name for name in ("id", "sha256") if uses.get(name) == {_UNIQUE}]
    return read_columns(profile, ["row", *uses], hashed=hashed)


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


def check_profile(
    profile: pd.DataFrame, suite: Suite, *, name_rows: Callable[[Sequence[int]], Sequence[str]] | None = None
) -> list[ExpectationOutcome]:
    """Run the suite over a profile.

    Args:
        profile: As ``build_profile`` makes it, or those of its columns that the suite asks about.
        suite: As ``parse_suite`` reads it.
        name_rows: Gives the ids of samples by their places; from the profile's own column when left out.

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
            outcomes.append(_explain_missing_column(expectation, missing[name]))
        else:
            outcomes.append(_as_outcome(expectation, results[name], name_rows or partial(_name_rows, profile)))
    return outcomes


def _name_rows(profile: pd.DataFrame, rows: Sequence[int]) -> list[str]:
    return [str(name) for name in profile["id"].iloc[list(rows)]]


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
        # Complete results hold every sample that is against an expectation.
        result_format={"result_format": "SUMMARY", "partial_unexpected_count": _EXAMPLES},
    )
    # Great Expectations moves failed ones to the front, so they are found by name.
    return {result.expectation_config.meta["name"]: result.to_json_dict() for result in run.results}


def _as_outcome(
    expectation: SuiteExpectation, result: Mapping[str, Any], name_rows: Callable[[Sequence[int]], Sequence[str]]
) -> ExpectationOutcome:
    facts = result.get("result") or {}
    explanation = expectation.meta.get("explanation", expectation.type)
    raised = _find_exception(result.get("exception_info") or {})
    if raised is not None:
        explanation = f"Could not be checked: {raised}. ({explanation})"
    index = [int(row) for row in facts.get("partial_unexpected_index_list") or []]
    count = int(facts.get("unexpected_count") or 0)
    return ExpectationOutcome(
        name=expectation.meta["name"],
        severity=expectation.severity,
        success=bool(result["success"]),
        unexpected_count=count,
        unexpected_percent=float(facts.get("unexpected_percent") or 0.0),
        examples=tuple(name_rows(index)) if index else (),
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


def _explain_missing_column(expectation: SuiteExpectation, column: str) -> ExpectationOutcome:
    hint = did_you_mean(column, PROFILE_COLUMNS)
    return ExpectationOutcome(
        name=expectation.meta["name"],
        severity=expectation.severity,
        success=False,
        unexpected_count=0,
        unexpected_percent=0.0,
        examples=(),
        explanation=f'Could not be checked: the profile has no column "{column}". {hint}'
        f"Its columns are {', '.join(PROFILE_COLUMNS)}.",
    )
