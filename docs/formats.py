"""Print docs/formats.md: every JSON file of ManyEyes, from the pydantic models that check it on write and read.

Run ``make docs`` after changing a model; a test compares.
"""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

# (file, module, class, who writes it)
FORMATS = [
    ("summary.json", "manyeyes.harness.events", "RunSummary", "`manyeyes run`, in `runs/<run-id>/`"),
    ("scorecard.json", "manyeyes.evaluation.scorecard", "Scorecard", "the step `evaluate`"),
    ("report.json", "manyeyes.evaluation.report.contents", "Report", "the steps `evaluate` and `merge_scorecards`"),
    ("score.json", "manyeyes.evaluation.score", "ScoreReport", "`manyeyes score`; with `--json` on stdout too"),
    ("judge", "manyeyes.evaluation.judging.scoring", "JudgeReport", "`manyeyes judge BENCHMARK --json`, on stdout"),
    (
        "judge (ensemble)",
        "manyeyes.evaluation.judging.scoring",
        "EnsembleReport",
        "`manyeyes judge scienceqa --other FILE --json`, on stdout",
    ),
    ("compare.json", "manyeyes.evaluation.compare", "ModelComparison", "`manyeyes compare A B`"),
    ("reliance.json", "manyeyes.evaluation.reliance", "RelianceReport", "`manyeyes reliance CHECKPOINT`"),
    (
        "correlation.json",
        "manyeyes.evaluation.statistics.correlation",
        "BenchmarkCorrelation",
        "`manyeyes correlate TABLES`",
    ),
    ("gate.json", "manyeyes.registry.gate", "GateReport", "the step `gate`"),
    ("lineage.json", "manyeyes.registry.lineage", "Lineage", "the step `register`, beside the version's evidence"),
    ("manifest.json (bundle)", "manyeyes.runtime.bundle_contents", "BundleManifest", "the step `export_onnx`"),
    ("preprocess.json (bundle)", "manyeyes.runtime.bundle_contents", "PreprocessFile", "the step `export_onnx`"),
    ("chat.json (bundle)", "manyeyes.runtime.bundle_contents", "ChatFile", "the step `export_onnx`"),
    ("parity.json", "manyeyes.export.parity", "ParityReport", "the step `export_onnx`"),
    ("validation.json", "manyeyes.data.validation_report", "ValidationReport", "the step `validate_data`"),
    (
        "quarantine.jsonl",
        "manyeyes.data.quarantine",
        "QuarantinedSample",
        "the step `validate_data`; `contaminated.jsonl` has the same lines; `manyeyes data import`, beside the shards",
    ),
    (
        "import.json",
        "manyeyes.data.importing.import_report",
        "ImportReport",
        "`manyeyes data import`, beside the shards",
    ),
    (
        "contamination.json",
        "manyeyes.data.contamination.findings",
        "ContaminationReport",
        "the step `validate_data` and `manyeyes data contamination`; `pairs.jsonl` has its pairs",
    ),
    (
        "generation.json",
        "manyeyes.data.generation.dataset",
        "GenerationReport",
        "`manyeyes data generate KIND`, beside the data set's shards",
    ),
    ("refused.jsonl", "manyeyes.data.generation.dataset", "RefusedItem", "the same; one line an item"),
    ("NAME-curation.json", "manyeyes.data.curation.report", "CurationReport", "`manyeyes data curate`"),
    ("data diff", "manyeyes.data.diff", "SnapshotDiff", "`manyeyes data diff A B --json`, on stdout"),
    ("manifest.json (snapshot)", "manyeyes.data.builders.manifest", "SnapshotManifest", "`manyeyes data build`"),
    ("stage.json", "manyeyes.training.stage", "StageReport", "every training step"),
    ("checkpoint.json", "manyeyes.model", "CheckpointManifest", "every training step"),
    ("conversion.json", "manyeyes.converters.convert", "ConversionReport", "`manyeyes convert`, in the checkpoint"),
    ("trial.json", "manyeyes.search.trial", "Trial", "the step `train_trial`"),
    ("search.json", "manyeyes.search.search", "Search", "the steps `start_search` and `advance_search`"),
    ("comparison.json", "manyeyes.steps.compare_trials", "AblationComparison", "the step `compare_trials`"),
    ("error.json", "manyeyes.harness.events", "ErrorReport", "any step that fails"),
    ("estimate", "manyeyes.estimate", "RecipeEstimate", "`manyeyes recipe show NAME --json`, beside recipe and digest"),
    (
        *("history record", "manyeyes.registry.history", "RegistryEvent"),
        "every move in the registry, to `MANYEYES_REGISTRY_WEBHOOK_URL`; its `record` is what the history holds",
    ),
    ("webhook", "manyeyes.steps.summarise_run", "RunNotice", "the step `summarise_run`, to `MANYEYES_WEBHOOK_URL`"),
    (
        "infra/profiles/NAME.yaml",
        "manyeyes.kubeflow.profiles",
        "Profile",
        "people; `manyeyes pipeline compile` reads it",
    ),
]


def describe(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """One short phrase for a JSON schema."""
    if "$ref" in schema:
        name = schema["$ref"].split("/")[-1]
        target = definitions[name]
        return f"[{name}](#{name.lower()})" if "properties" in target else describe(target, definitions)
    if "anyOf" in schema or "oneOf" in schema:
        return " or ".join(describe(choice, definitions) for choice in schema.get("anyOf", schema.get("oneOf")))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{choice}`" for choice in schema["enum"])
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return "[" + ", ".join(describe(item, definitions) for item in schema["prefixItems"]) + "]"
        return f"list of {describe(schema['items'], definitions)}" if "items" in schema else "list"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"map of {describe(schema['additionalProperties'], definitions)}"
    return str(schema.get("type", "any"))


def table(schema: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    """A Markdown table of the fields of one object."""
    required = set(schema.get("required", []))
    lines = ["| field | type | meaning |", "| --- | --- | --- |"]
    for name, field in schema["properties"].items():
        meaning = field.get("description", "")
        if name not in required and "default" in field:
            meaning += f" Default: `{field['default']}`." if field["default"] not in (None, "") else ""
        kind = describe(field, definitions).replace("|", "\\|")
        lines.append(f"| `{name}` | {kind} | {meaning.strip()} |")
    return lines


def section(name: str, definition: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    """A type that is part of a file: its heading, what it is and its fields."""
    summary = (definition.get("description") or "").splitlines()[:1]
    return ["", f"### {name}", "", *summary, *([""] if summary else []), *table(definition, definitions)]


def render() -> str:
    """The whole document.

    Raises:
        ValueError: Two types of one name differ: a link could not tell them apart.
    """
    lines = [
        "# JSON files",
        "",
        "Every file below is written and read through one pydantic model: an unknown or missing field is an error that",
        "names it. A type that several files share stands once, at the end. The page is generated from those models by",
        "`make docs`.",
    ]
    files = []
    sections: dict[str, list[str]] = {}
    users: Counter[str] = Counter()
    for title, module, class_name, writer in FORMATS:
        model = getattr(importlib.import_module(module), class_name)
        schema = model.model_json_schema(mode="serialization")
        definitions = {name: part for name, part in schema.get("$defs", {}).items() if "properties" in part}
        files.append((title, writer, schema, list(definitions)))
        for name, definition in definitions.items():
            text = section(name, definition, schema["$defs"])
            if sections.setdefault(name, text) != text:
                raise ValueError(f"two types are called {name}, and they differ; rename one of them")
            users[name] += 1
    for title, writer, schema, names in files:
        lines += ["", f"## {title}", "", f"Written by {writer}. {schema.get('description', '').splitlines()[0]}", ""]
        lines += table(schema, schema.get("$defs", {}))
        for name in names:
            lines += sections[name] if users[name] == 1 else []
    lines += ["", "## Shared types", "", "Parts of several of the files above."]
    for name in sorted(name for name, count in users.items() if count > 1):
        lines += sections[name]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
