"""What preflight looks at, one function a subject. None of them raises for what it can say as a row."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from manyeyes.data.download import RemoteFile, list_files, normalise_md5
from manyeyes.data.remote import Remote, open_remote
from manyeyes.data.snapshot import MANIFEST, SnapshotManifest
from manyeyes.errors import ManyEyesError, SnapshotError, SourceError, did_you_mean
from manyeyes.estimate import RecipeEstimate
from manyeyes.harness.inputs import cache_dir, compared_datasets, locate_data, training_datasets, work_dir
from manyeyes.recipe import Recipe
from manyeyes.sources import language_model_config_file, resolve_source
from manyeyes.steps.check_parts import check_parts
from manyeyes.steps.kept import kept

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
                f"remote {self.remote.url} {state} {path}", "the file with its md5", "Push it again: dvc push"
            )
        return data


class Need(BaseModel):
    """What a recipe needs of a machine, in GB (1e9 bytes)."""

    model_config = ConfigDict(extra="forbid")

    memory_gb: dict[str, float] = Field(description="Peak of each device by stage.")
    fixed_gb: dict[str, float] = Field(description="The part of it that no batch size changes.")
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
    found = kept_estimate(recipe, data)
    parts = found.memory_parts_gb.items()
    return Need(
        memory_gb=found.memory_gb,
        fixed_gb={name: part.weights + part.gradients + part.optimizer for name, part in parts},
        disk_gb=found.disk_gb.total,
        least_disk_gb=found.disk_gb.running + found.disk_gb.bundle,
    )


def kept_estimate(recipe: Recipe, data: RemoteData | None) -> RecipeEstimate:
    """The estimate of a recipe, kept between runs: making it takes torch, which takes seconds to load.

    Raises:
        ManyEyesError: The model cannot be built as the recipe says.
    """
    source = recipe.model.language_model.source
    with language_model_folder(recipe, data) as folder:
        config = language_model_config_file(source, snapshot_path=folder)

        def make() -> str:
            from manyeyes.estimate.skeleton import estimate

            check_parts(recipe.model)
            return estimate(recipe, snapshot_path=folder).model_dump_json()

        # A file that is not there is refused where it is read.
        digest = hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else "none"
        return RecipeEstimate.model_validate_json(kept("estimates", recipe.digest, digest, make=make))


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
    if data is not None and not (cache_dir() / "snapshots" / data.md5).is_dir():
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


def check_memory(need: Need | None) -> list[Check]:
    """Memory of each device that trains, against the recipe's largest stage."""
    if need is None or not need.memory_gb:
        return []
    stage = max(need.memory_gb, key=lambda name: need.memory_gb[name])
    wanted, fixed = need.memory_gb[stage], need.fixed_gb[stage]
    needed = f"{wanted:,.2f} GB for {stage}, {fixed:,.2f} GB of it whatever the batch"
    known = device_memory()
    if known is None:
        return [Check("memory", "warning", "the memory of the nodes that train is not known here", needed, _KNOWN)]
    capacity, where = known
    found = f"{capacity:,.1f} GB ({where})"
    if fixed > capacity:
        return [Check("memory", "problem", found, needed, "Use a larger device, or train fewer parts.")]
    if wanted > capacity:
        do = f"Lower stages.{stage}.micro_batch_size, or use a larger device."
        return [Check("memory", "warning", found, needed, do)]
    return [Check("memory", "ok", found, needed)]


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
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        answer = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_GPU_TIMEOUT_S, check=False
        )
        sizes = [float(line) for line in answer.stdout.split() if line.replace(".", "").isdigit()]
        if sizes:
            return min(sizes) * 2**20 / _GB, "the smallest GPU of this machine"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GB, "this machine, without a GPU"


def _tried(subject: str, found: str, call: Callable[[], object]) -> Check:
    try:
        call()
    except ManyEyesError as error:
        return Check(subject, "problem", error.found, error.needed, error.do)
    return Check(subject, "ok", found)
