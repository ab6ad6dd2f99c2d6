"""The very first step: everything that a run needs is looked at, and all that is wrong is said at once.

It asks for no GPU and reads no data beyond a few small files, so that a run that cannot succeed ends within seconds.
Never cached: it is about the world outside.

There is one function a subject, and none of them raises for what it can say as a row.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pydantic
from pydantic import Field

from manyeyes.data.fetching import RemoteFile, list_files, normalise_md5, shards_limit
from manyeyes.data.remote import Remote, open_remote
from manyeyes.data.snapshot import MANIFEST, SnapshotManifest
from manyeyes.errors import ManyEyesError, PreflightError, SnapshotError, SourceError, did_you_mean
from manyeyes.estimate import RecipeEstimate, RecipeFacts, counted_fields, facts_key, needs, shipped_facts
from manyeyes.estimate.memory import StageFacts, nearest_change, way_of, worst_memory
from manyeyes.harness.base import Reporter, Step, StepResult, tagging_failure
from manyeyes.harness.events import pipeline_tags, result_tags
from manyeyes.harness.inputs import cache_dir, compared_datasets, locate_data, training_datasets, work_dir
from manyeyes.harness.kept import kept
from manyeyes.harness.trainjob import CLAIM, check_trainjobs
from manyeyes.pages import Table, Text, facts_table, step_page
from manyeyes.recipe import Recipe, StageName
from manyeyes.recipe.partial import take_fields
from manyeyes.recipe.recipe import JudgeSpec
from manyeyes.registry.references import check_registry_name
from manyeyes.sources import language_model_config_file, resolve_source
from manyeyes.steps.resolve_data import Resolved, pin_steps, read_recipe, resolve
from manyeyes.storage import hash_file
from manyeyes.strict import StrictModel

if TYPE_CHECKING:
    from manyeyes.registry.tracking import StepRun


_HUB_TIMEOUT_S = 10
_GPU_TIMEOUT_S = 10
_GB = 1e9


@dataclass(frozen=True)
class Check:
    """One row of preflight's table.

    Attributes:
        subject: What was looked at.
        state: ``ok``; ``warning``: may go wrong, or cannot be known here; ``problem``: the run cannot succeed.
        found: What was found.
        needed: What is needed; may be empty when all is well.
        do: What to do about it; may be empty when all is well.
    """

    subject: str
    state: Literal["ok", "warning", "problem"]
    found: str
    needed: str = ""
    do: str = ""


@dataclass(frozen=True)
class RemoteData:
    """A snapshot as its remote lists it; nothing but the listing and the manifest was fetched.

    Attributes:
        md5: Of the snapshot.
        remote: That holds it.
        files: By path.
        manifest: What is in it.
    """

    md5: str
    remote: Remote
    files: dict[str, RemoteFile]
    manifest: SnapshotManifest

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for dataset in self.manifest.datasets.values() for shard in dataset.shards)

    def read(self, path: str) -> bytes:
        """A small file of the snapshot, its md5 checked.

        Raises:
            SnapshotError: The remote lacks it, or holds other bytes.
        """
        file = self.files.get(path)
        if file is None:
            raise SnapshotError(f"the snapshot has no {path}", "this file", did_you_mean(path, self.files))
        data = self.remote.read(f"files/md5/{file.md5[:2]}/{file.md5[2:]}")
        if data is None or hashlib.md5(data, usedforsecurity=False).hexdigest() != file.md5:
            state = "lacks" if data is None else "holds a damaged copy of"
            raise SnapshotError(
                f"remote {self.remote.url} {state} {path}", "the file with its md5", self.remote.push_again
            )
        return data


class Need(StrictModel):
    """What a recipe needs of a machine; disk in GB (1e9 bytes)."""

    stages: dict[str, tuple[StageFacts, ...]] = Field(description="What the memory of each stage follows from.")
    disk_gb: float = Field(description="Running checkpoints, results and bundle.")
    least_disk_gb: float = Field(description="Running checkpoints and bundle alone.")


def check_stages(recipe: Recipe) -> list[Check]:
    """That some stage makes a model, every benchmark is known, and the gate has something to decide from."""
    from manyeyes.evaluation.benchmarks import find_benchmark

    checks = [Check("recipe", "ok", f"{recipe.name}, digest {recipe.digest[:12]}")]
    if recipe.stages.pretrain is None and recipe.stages.sft is None:
        checks.append(
            Check("stages", "problem", "no stage that makes a model", "pretrain, sft or both", "Add stages.sft.")
        )
    for name in recipe.evaluation.benchmarks:
        checks.append(_tried(f"benchmark {name}", name, partial(find_benchmark, name)))
    if not compared_datasets(recipe) and any(rule.rule == "contamination" for rule in recipe.gate):
        checks.append(
            Check(
                "gate",
                "warning",
                "rule contamination, and no data set to compare the training data with: it will not be met",
                "data.eval_datasets or data.contamination.benchmarks",
                "Name the evaluation's data sets there, or leave the rule out.",
            )
        )
    return checks


def find_data(data_md5: str, data_remote: str) -> RemoteData:
    """Find the snapshot in its remote, and read its listing and manifest.

    Raises:
        SnapshotError: The remote lacks it, does not answer, or holds a damaged listing or manifest.
    """
    given, url = locate_data(data_md5, data_remote)
    md5, remote = normalise_md5(given), open_remote(url)
    files = {file.relpath: file for file in list_files(remote, md5)}
    data = RemoteData(md5, remote, files, SnapshotManifest(datasets={}))
    try:
        manifest = SnapshotManifest.model_validate_json(data.read(MANIFEST))
    except pydantic.ValidationError as error:
        raise SnapshotError(
            f"{MANIFEST} of snapshot {md5} is broken ({error.errors()[0]['msg']})", "a manifest", "Build it again."
        ) from error
    return RemoteData(md5, remote, files, manifest)


def check_data(data: RemoteData, recipe: Recipe | None) -> list[Check]:
    """That the remote lists every shard, and the snapshot has every data set that the recipe names."""
    checks = [Check("data", "ok", f"{data.md5}: {len(data.files):,} files in {data.remote.url}")]
    known = data.manifest.datasets
    for name in _datasets(recipe) if recipe is not None else ():
        if name not in known:
            checks.append(
                Check(
                    f"data set {name}",
                    "problem",
                    "not in the snapshot",
                    f"one of {', '.join(sorted(known)) or 'none'}",
                    did_you_mean(name, known) or "Add it to the snapshot, or name another.",
                )
            )
            continue
        absent = [shard.path for shard in known[name].shards if shard.path not in data.files]
        if absent:
            checks.append(
                Check(f"data set {name}", "problem", f"no {absent[0]}", "every shard", "Push it again: dvc push")
            )
        else:
            checks.append(Check(f"data set {name}", "ok", f"{known[name].rows:,} records"))
    return checks


def _datasets(recipe: Recipe) -> list[str]:
    from manyeyes.evaluation.benchmarks import BENCHMARKS

    judged = [BENCHMARKS[name].dataset for name in recipe.evaluation.benchmarks if name in BENCHMARKS]
    return list(dict.fromkeys([*training_datasets(recipe), *recipe.data.eval_datasets, *judged]))


def check_sources(recipe: Recipe, data: RemoteData | None) -> list[Check]:
    """That every pretrained part can be had: in the snapshot, on this disk, in a package, or on the hub."""
    parts = [(f"encoder {encoder.name}", encoder.source) for encoder in recipe.model.encoders]
    parts.append(("language model", recipe.model.language_model.source.removeprefix("scratch:") or "scratch:"))
    checks = []
    for subject, source in parts:
        scheme, _, rest = source.partition(":")
        if scheme == "hub":
            checks.append(_tried(subject, source, partial(_check_hub, rest)))
        elif scheme == "snapshot":
            checks += [] if data is None else [_in_snapshot(subject, source, rest, data)]
        else:
            checks.append(_tried(subject, source, partial(resolve_source, source, snapshot_path=None)))
    return checks


def _in_snapshot(subject: str, source: str, place: str, data: RemoteData) -> Check:
    inside = [path for path in data.files if path == place or path.startswith(f"{place.rstrip('/')}/")]
    if inside:
        return Check(subject, "ok", f"{source} ({len(inside)} files)")
    folders = {path.rpartition("/")[0] for path in data.files}
    return Check(
        subject,
        "problem",
        f'source is "{source}"',
        "a file or folder of the snapshot",
        did_you_mean(place, folders) or "Add it to the snapshot, or use dir: or hub:.",
    )


def _check_hub(place: str) -> None:
    """Ask the hub for a repository at a revision, or look into the local cache when the hub does not answer.

    Raises:
        SourceError: Neither has it.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    # Of the hub's HTTP library, whichever that is: what a network out of reach raises (huggingface_hub 2.4).
    from huggingface_hub.errors import HTTPError as NoAnswer  # type: ignore[attr-defined]

    repository, _, revision = place.partition("@")
    if not revision:
        resolve_source(f"hub:{place}", snapshot_path=None)  # says what is missing
    try:
        HfApi().model_info(repository, revision=revision, timeout=_HUB_TIMEOUT_S)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, NoAnswer, OSError) as error:
        if any(
            isinstance(try_to_load_from_cache(repository, name, revision=revision), str)
            for name in ("config.json", "model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
        ):
            return
        refused = isinstance(error, HfHubHTTPError) and error.response is not None
        raise SourceError(
            f'source is "hub:{place}" ({type(error).__name__})',
            "the hub must have it at that revision, or the local cache",
            "Check name and revision, and HF_TOKEN for a model that asks for consent."
            if refused
            else "Check the network, or fill the cache first (hf download) and set HF_HUB_OFFLINE=1.",
            retry=not refused,
        ) from error


def estimate_recipe(recipe: Recipe, data: RemoteData | None) -> Need:
    """What the recipe needs, from its own estimate.

    Raises:
        ManyEyesError: The model cannot be built as the recipe says.
    """
    facts = kept_facts(recipe, data)
    disk = needs(recipe, facts).disk_gb
    return Need(stages=facts.stages, disk_gb=disk.total, least_disk_gb=disk.running + disk.bundle)


def kept_estimate(recipe: Recipe, data: RemoteData | None) -> RecipeEstimate:
    """The estimate of a recipe; what has to be counted for it takes torch, which takes seconds to load, and is kept.

    Raises:
        ManyEyesError: The model cannot be built as the recipe says.
    """
    return needs(recipe, kept_facts(recipe, data))


def kept_facts(recipe: Recipe, data: RemoteData | None) -> RecipeFacts:
    """What is counted on a recipe's model: shipped for the published recipes, kept between runs for the others.

    Raises:
        ManyEyesError: The model cannot be built as the recipe says.
    """
    recipe = take_fields(recipe, ("model", "stages"), reader="the estimate")
    source = recipe.model.language_model.source
    with language_model_folder(recipe, data) as folder:
        config = language_model_config_file(source, snapshot_path=folder)

        def make() -> str:
            from manyeyes.estimate.skeleton import count_facts
            from manyeyes.model.from_recipe import check_parts

            check_parts(recipe.model)
            return count_facts(recipe, snapshot_path=folder).model_dump_json()

        # A file that is not there is refused where it is read.
        fields, digest = counted_fields(recipe), hash_file(config) if config.is_file() else "none"
        shipped = shipped_facts(facts_key(fields, digest))
        return shipped or RecipeFacts.model_validate_json(kept("facts", fields, digest, make=make))


def check_packing(recipe: Recipe, data: RemoteData | None) -> None:
    """Make sure that the language model keeps samples of a row apart, where a stage packs them.

    Raises:
        ManyEyesError: It cannot, or its configuration cannot be had.
    """
    packed = [name for name, spec in recipe.present_stages() if spec.packing is not None]
    if not packed:
        return
    from transformers import AutoModelForCausalLM

    from manyeyes.encoders.weights import meta_device
    from manyeyes.model.language_model import language_model_config
    from manyeyes.model.segments import enable_packing

    with language_model_folder(recipe, data) as folder:
        config = language_model_config(recipe.model.language_model.source, snapshot_path=folder)
    with meta_device():
        model = AutoModelForCausalLM.from_config(config)
    enable_packing(model, longest=max(recipe.stage_model(name).language_model.max_length for name in packed))


@contextmanager
def language_model_folder(recipe: Recipe, data: RemoteData | None) -> Iterator[Path | None]:
    """A folder that holds the language model's configuration as the snapshot would, where its source is one."""
    source = recipe.model.language_model.source.removeprefix("scratch:")
    scheme, _, place = source.partition(":")
    if scheme != "snapshot" or data is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / place / "config.json"
        path.parent.mkdir(parents=True)
        path.write_bytes(data.read(f"{place.rstrip('/')}/config.json"))
        yield Path(name)


def check_disk(need: Need | None, data: RemoteData | None) -> list[Check]:
    """Free space where running checkpoints and snapshots go, against what the recipe writes."""
    checks = []
    if need is not None:
        here = trains_here() or bool(os.environ.get("MANYEYES_WORKDIR"))
        do = "Free some space, or set MANYEYES_WORKDIR to a larger disk."
        checks.append(_space("disk for checkpoints", work_dir(), need.disk_gb, need.least_disk_gb, here=here, do=do))
    folder = None if data is None else cache_dir() / "snapshots" / data.md5
    # With a bound, and where it has begun to come, how much of it will be there at once is not known here.
    if data is not None and folder is not None and not folder.is_dir() and shards_limit() is None:
        size = data.num_bytes / _GB
        do = "Free some space, or set MANYEYES_CACHE to a larger disk."
        checks.append(_space("disk for the snapshot", cache_dir(), size, size, here=True, do=do))
    return checks


def _space(subject: str, folder: Path, wanted_gb: float, least_gb: float, *, here: bool, do: str) -> Check:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / _GB
    found, needed = f"{free:,.1f} GB free at {folder}", f"{wanted_gb:,.2f} GB"
    if not here:
        return Check(subject, "warning", "steps may write elsewhere than here", needed, "Give them so much disk.")
    if free < least_gb:
        return Check(subject, "problem", found, f"{needed}, {least_gb:,.2f} GB at least", do)
    if free < wanted_gb:
        return Check(subject, "warning", found, needed, do)
    return Check(subject, "ok", found, needed)


def check_memory(recipe: Recipe | None, need: Need | None) -> list[Check]:
    """Memory of the devices that train, against each stage's; what does not fit is said with the nearest change.

    A machine without a GPU may be lucky: samples are rarely as long as they can be, and it has room to swap.
    """
    checks: list[Check] = []
    known = device_memory()
    for name, spec in recipe.present_stages() if recipe is not None and need is not None else ():
        way = way_of(spec, devices_of(name), math.inf if known is None else known[0])
        branches = need.stages[name] if need is not None else ()
        memory = worst_memory(branches, spec, way)
        subject = f"memory of {name}"
        each = f"each of {way.devices} devices" if way.devices > 1 else "one device"
        needed = f"{memory.total:,.2f} GB on {each}, {memory.fixed:,.2f} GB of it whatever the micro-batch"
        if known is None:
            found = "the memory of the nodes that train is not known here"
            checks.append(Check(subject, "warning", found, needed, _KNOWN))
            continue
        capacity, where = known
        found = f"{capacity:,.1f} GB ({where})"
        if memory.total <= capacity:
            checks.append(Check(subject, "ok", found, needed))
            continue
        lucky = memory.fixed <= capacity and where == _NO_GPU
        do = nearest_change(name, branches, spec, way, capacity, more=where != _NO_GPU)
        checks.append(Check(subject, "warning" if lucky else "problem", found, needed, do))
    return checks


_NO_GPU = "this machine, without a GPU"
_KNOWN = "Give the training steps a device of that size; MANYEYES_DEVICE_MEMORY_GB tells preflight what they have."


def trains_here() -> bool:
    """Whether the training steps run on this machine: ``manyeyes run`` says so, a cluster does not."""
    return "MANYEYES_RUN_LOCK" in os.environ


def device_memory() -> tuple[float, str] | None:
    """GB of the smallest device that trains, and where that is known from; None where it is not."""
    given = os.environ.get("MANYEYES_DEVICE_MEMORY_GB")
    if given:
        return float(given), "MANYEYES_DEVICE_MEMORY_GB"
    if not trains_here():
        return None
    sizes = _gpus()
    if sizes:
        return min(sizes), "the smallest GPU of this machine"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GB, _NO_GPU


def devices_of(stage: StageName) -> int:
    """How many devices train a stage: the cluster profile says it, or this machine."""
    for entry in os.environ.get("MANYEYES_DEVICES", "").split(","):
        name, _, count = entry.partition("=")
        if name.strip() == stage and count.strip().isdigit():
            return max(1, int(count))
    given = os.environ.get("MANYEYES_PROCESSES", "")
    if given.isdigit():
        return max(1, int(given))
    return max(1, len(_gpus())) if trains_here() else 1


def _gpus() -> list[float]:
    """GB of each GPU of this machine."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=_GPU_TIMEOUT_S, check=False
    )
    return [float(line) * 2**20 / _GB for line in answer.stdout.split() if line.replace(".", "").isdigit()]


def _tried(subject: str, found: str, call: Callable[[], object]) -> Check:
    try:
        call()
    except ManyEyesError as error:
        return Check(subject, "problem", error.found, error.needed, error.do)
    return Check(subject, "ok", found)


_TIMEOUT_S = 10.0


def check_judge(recipe: Recipe) -> list[Check]:
    """That the judge answers, where a benchmark of the recipe needs one: one question, one token of answer.

    Without a judge such benchmarks are skipped: a warning. A judge that is away or busy may be back by the time that it
    is asked: a warning too. Both are wrong where a gate rule is on such a benchmark. A judge that refuses the key or
    lacks the model ends the evaluation, whatever the gate says; an empty key is a warning on a machine that does not
    evaluate.

    Returns:
        No rows where no benchmark needs a judge.

    Raises:
        JudgeError: The gate needs the judge, which is away or busy.
    """
    from manyeyes.evaluation.benchmarks import BENCHMARKS
    from manyeyes.evaluation.judging.judge import Judge, JudgeError
    from manyeyes.evaluation.judging.scoring import JUDGINGS

    spec = recipe.evaluation.judge
    asked = [name for name in recipe.evaluation.benchmarks if name in BENCHMARKS]
    needed = [name for name in asked if BENCHMARKS[name].judged or (spec is not None and name in JUDGINGS)]
    if not needed:
        return []
    gated = [name for name in needed if name in {getattr(rule, "benchmark", None) for rule in recipe.gate}]
    if spec is None:
        return [_without(needed, gated)]
    try:
        served = Judge(spec.model_copy(update={"timeout_s": min(spec.timeout_s, _TIMEOUT_S)})).probe()
    except JudgeError as error:
        if error.retry and gated:
            raise
        has_key = bool(os.environ.get(spec.key_from, "").strip())
        certain = not error.retry and (bool(gated) or has_key or trains_here())
        do = error.do if error.retry else f"{error.do} It is asked about {', '.join(needed)}."
        return [Check("judge", "problem" if certain else "warning", error.found, error.needed, do)]
    return [Check("judge", "ok", f"{spec.model} at {spec.endpoint} answers{_as(served, spec)}; {', '.join(needed)}")]


def _without(needed: list[str], gated: list[str]) -> Check:
    do = "Give evaluation.judge in the recipe, with an endpoint and a model."
    if gated:
        found = f"no judge, and the gate has rules on {', '.join(gated)}"
        return Check("judge", "problem", found, "a language model that judges", do)
    return Check(
        "judge", "warning", f"no judge: {', '.join(needed)} will be skipped", "a language model that judges", do
    )


def _as(served: str, spec: JudgeSpec) -> str:
    return f" as {served}" if served and served != spec.model else ""


_WORDS = {"ok": "fine", "warning": "warning", "problem": "wrong"}
_KINDS = {"ok": "good", "warning": "quiet", "problem": "bad"}


@dataclass
class _Findings:
    """What was looked at, in order."""

    checks: list[Check] = field(default_factory=list)
    retry: bool = False

    @contextmanager
    def collecting(self, subject: str) -> Iterator[None]:
        """Turn an error that a user can fix into a row, and go on behind the block."""
        try:
            yield
        except ManyEyesError as error:
            self.retry = self.retry or error.retry
            self.checks.append(Check(subject, "problem", error.found, error.needed, error.do))

    def of(self, state: Literal["ok", "warning", "problem"]) -> list[Check]:
        return [check for check in self.checks if check.state == state]


def preflight(
    reporter: Reporter,
    *,
    recipe: str,
    recipe_overrides: str = "",
    recipe_text: str = "",
    data_md5: str = "",
    data_remote: str = "",
    registry_model: str = "",
) -> StepResult:
    """Look at everything that a run needs, and say all that is wrong at once.

    The recipe and its parts, the snapshot in its remote, pretrained weights, the judge where a benchmark needs one
    (it is asked for one token), MLflow (something is really written, and removed), the registry's name, and disk and
    memory against the recipe's own estimate. What this machine cannot know (the memory of another node) is a warning
    and no error. Where nothing is wrong, recipe, data and code are pinned for all steps that follow.

    Args:
        reporter: Shows the progress.
        recipe: A shipped recipe's name, the path of a YAML file, or the text of a recipe (YAML or JSON).
        recipe_overrides: One ``a.b=value`` a line.
        recipe_text: Text of a recipe, taken instead of ``recipe``; a cluster's form offers shipped names only there.
        data_md5: Snapshot; ``data.dvc`` of the working directory says it when empty.
        data_remote: A folder, ``s3://`` or ``hub:OWNER/NAME@COMMIT``; the working directory's default when empty.
        registry_model: Name in the registry; the recipe's own when empty.

    Returns:
        Values: those of ``resolve_data``.

    Raises:
        PreflightError: Something is missing or wrong; ``problems`` says what.
    """
    found = _Findings()
    with ExitStack() as runs:
        log: StepRun | None = None
        with found.collecting("MLflow"):
            from manyeyes.registry.tracking import probe, step_run

            # The step's own run, and with it the first thing that MLflow has to take.
            log = runs.enter_context(step_run(reporter.step, tags=pipeline_tags()))
            runs.enter_context(tagging_failure(reporter.step, log))
            found.checks += _mlflow_rows(probe(log))
        _look(found, reporter, recipe_text or recipe, recipe_overrides, data_md5, data_remote, registry_model)
        resolved: Resolved | None = None
        if not found.of("problem"):
            with found.collecting("recipe"):
                resolved = resolve(
                    recipe=recipe_text or recipe,
                    recipe_overrides=recipe_overrides,
                    data_md5=data_md5,
                    data_remote=data_remote,
                    registry_model=registry_model,
                )
        sys.stderr.write(_as_text(found.checks))
        problems, warnings = found.of("problem"), found.of("warning")
        if problems or resolved is None:
            rows = [{name: getattr(check, name) for name in ("subject", "found", "needed", "do")} for check in problems]
            raise PreflightError(rows, retry=found.retry)
        headline = f"{len(found.checks)} checks, nothing wrong"
        if warnings:
            headline += f", {len(warnings)} warning{'s' if len(warnings) > 1 else ''}"
        if log is not None:
            log.set_tags(result_tags(headline, {}))
    facts, checks = facts_table(resolved.facts), as_table(found.checks)
    return StepResult(
        headline=headline,
        metrics={"checks": float(len(found.checks)), "warnings": float(len(warnings))},
        html=step_page(
            "Preflight",
            "What this run trains, on which data, with which code, and whether all that it needs is there.",
            {"What runs": facts, "What it needs": checks},
        ),
        markdown=f"{facts.markdown()}\n\n{checks.markdown()}\n",
        values={**pin_steps(resolved.pinned), "registry_model": resolved.registry_model},
        metadata=resolved.metadata,
    )


def _look(
    found: _Findings,
    reporter: Reporter,
    recipe: str,
    recipe_overrides: str,
    data_md5: str,
    data_remote: str,
    registry_model: str,
) -> None:
    parsed: Recipe | None = None
    data: RemoteData | None = None
    need: Need | None = None
    with found.collecting("recipe"):
        parsed = read_recipe(recipe, recipe_overrides)
        found.checks += check_stages(parsed)
    if registry_model or parsed is not None:
        with found.collecting("registry name"):
            model = registry_model or (parsed.registry.model if parsed else "")
            check_registry_name(model)
            found.checks.append(Check("registry name", "ok", model))
    reporter.progress("looking for the snapshot", done=0.4)
    with found.collecting("data"):
        data = find_data(data_md5, data_remote)
        found.checks += check_data(data, parsed)
    if parsed is not None:
        found.checks += check_sources(parsed, data)
        with found.collecting("judge"):
            found.checks += check_judge(parsed)
        if any(spec.lora is not None and spec.lora.quantize for _, spec in parsed.present_stages()):
            with found.collecting("4 bits"):
                from manyeyes.training.adapters import import_bitsandbytes

                import_bitsandbytes()
        reporter.progress("estimating memory and disk", done=0.6)
        in_snapshot = parsed.model.language_model.source.removeprefix("scratch:").startswith("snapshot:")
        if data is not None or not in_snapshot:
            with found.collecting("model"):
                need = estimate_recipe(parsed, data)
            with found.collecting("packing"):
                check_packing(parsed, data)
    found.checks += check_disk(need, data)
    found.checks += check_memory(parsed, need)
    if claim := os.environ.get(CLAIM):
        errors = check_trainjobs(claim)
        found.retry = found.retry or any(error.retry for error in errors)
        found.checks += [Check("TrainJob", "problem", error.found, error.needed, error.do) for error in errors]
        if not errors:
            found.checks.append(Check("TrainJob", "ok", f"may be made and read here; claim {claim}"))


def _mlflow_rows(left: Sequence[str]) -> list[Check]:
    rows = [Check("MLflow", "ok", "a run, an artifact and a registered model were written and removed")]
    for name in left:
        found = f"{name} could not be removed"
        rows.append(Check("MLflow", "warning", found, "nothing left of the probe", "Remove it by hand."))
    return rows


def as_table(checks: Sequence[Check]) -> Table:
    """What is wrong stands first."""
    rows: list[list[str | Text]] = [
        [Text(_WORDS[check.state], kind=_KINDS[check.state]), check.subject, check.found, check.needed, check.do]
        for check in _sorted(checks)
    ]
    return Table(("", "what", "found", "needed", "do"), rows, stacked=True)


def _as_text(checks: Sequence[Check]) -> str:
    lines = []
    for check in _sorted(checks):
        lines.append(f"{_WORDS[check.state]:<8} {check.subject}: {check.found}")
        pairs = (("needed", check.needed), ("do", check.do)) if check.state != "ok" else ()
        lines += [f"         {name:<7} {text}" for name, text in pairs if text]
    return "\n".join(lines) + "\n"


def _sorted(checks: Sequence[Check]) -> list[Check]:
    order = ("problem", "warning", "ok")
    return sorted(checks, key=lambda check: order.index(check.state))


STEP = Step("preflight", preflight, imports=("manyeyes.registry.tracking",), tracked=False)
