"""Builds, saves and loads the model; importing this registers it with transformers' Auto classes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from manyeyes.encoders import Encoder, encoder_row, encoder_transform, load_encoder_weights
from manyeyes.errors import CheckpointError, RecipeError, StorageError, did_you_mean
from manyeyes.language_model import (
    check_vocabulary,
    find_image_token_id,
    load_language_model,
    load_language_model_config,
    load_tokenizer,
    resolve_language_model,
)
from manyeyes.modeling import (
    BranchAnswers,
    BranchOutput,
    ManyEyesConfig,
    ManyEyesForConditionalGeneration,
    ManyEyesOutput,
    build_encoders,
)
from manyeyes.processor import SHARED, ManyEyesProcessor
from manyeyes.recipe import EncoderSpec, FusionSpec, LayoutSpec, ModelSpec, SharedSpec
from manyeyes.runtime.preprocess import ImageTransform
from manyeyes.runtime.tiling import TokenLayout
from manyeyes.sources import resolve_source
from manyeyes.storage import new_folder

__all__ = [
    "BranchAnswers",
    "BranchOutput",
    "CheckpointManifest",
    "ManyEyesConfig",
    "ManyEyesForConditionalGeneration",
    "ManyEyesOutput",
    "ManyEyesProcessor",
    "build_model",
    "build_skeleton",
    "checkpoint_digest",
    "load_checkpoint",
    "save_checkpoint",
    "write_manifest",
]

MANIFEST = "checkpoint.json"

AutoConfig.register("manyeyes", ManyEyesConfig, exist_ok=True)
AutoModelForImageTextToText.register(ManyEyesConfig, ManyEyesForConditionalGeneration, exist_ok=True)
AutoProcessor.register(ManyEyesConfig, ManyEyesProcessor, exist_ok=True)


class CheckpointManifest(BaseModel):
    """``checkpoint.json``: what a checkpoint is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: dict[str, str] = Field(description="sha256 of each file of the checkpoint, by its path inside the folder.")
    digest: str = Field(description="sha256 over the sorted lines `<path> <sha256>`; names the checkpoint.")


def build_model(
    spec: ModelSpec, *, snapshot_path: Path | None, seed: int, encoders: Sequence[str] | None = None
) -> tuple[ManyEyesForConditionalGeneration, ManyEyesProcessor]:
    """Make a model from a recipe and load its pretrained parts.

    Args:
        spec: What the model is.
        snapshot_path: Folder of the data snapshot, for ``snapshot:`` sources.
        seed: Everything that is not pretrained is drawn from it; torch's global generator is left as it was.
        encoders: Only these, by their names in the recipe (prealign); all when left out.

    Returns:
        Model in fp32 and evaluation mode, and its processor.

    Raises:
        RecipeError: An unknown encoder, fusion, template or name in ``encoders``.
        SourceError: A pretrained part cannot be had or does not fit.
        ShapeError: Parts do not fit together.
    """
    chosen = _choose_encoders(spec, encoders)
    path, pretrained = resolve_language_model(spec.language_model.source, snapshot_path=snapshot_path)
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, load_language_model_config(path))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with _without_progress_bars():
            language_model = load_language_model(path, pretrained=pretrained)
        text_config = language_model.config
        config = _configure(
            spec, chosen, text_config=text_config, image_token_id=find_image_token_id(tokenizer, text_config)
        )
        # A skeleton without memory, then the real parts: nothing is drawn or loaded twice.
        with torch.device("meta"):
            model = ManyEyesForConditionalGeneration(config)
        model.language_model = language_model
        model.config.text_config = text_config
        model.encoders = build_encoders(config.encoders)
        model.connect()
    for entry in chosen:
        row = encoder_row(entry.encoder)
        weights = resolve_source(
            entry.source, snapshot_path=snapshot_path, files=row.files, parts=list(row.parts.values())
        )
        if weights is not None:
            encoder = model.encoders[entry.name]
            assert isinstance(encoder, Encoder)
            load_encoder_weights(encoder, entry.encoder, weights)
    processor = _make_processor(spec, chosen, model, tokenizer)
    generation = model.generation_config
    generation.eos_token_id = processor.stop_token_ids
    generation.pad_token_id = tokenizer.pad_token_id
    generation.bos_token_id = tokenizer.bos_token_id
    return model.eval(), processor


def build_skeleton(
    spec: ModelSpec, *, text_config: PreTrainedConfig, encoders: Sequence[str] | None = None
) -> ManyEyesForConditionalGeneration:
    """Make a recipe's model on the meta device: true sizes, no memory, no weights and no network.

    Args:
        spec: What the model is.
        text_config: The language model's configuration.
        encoders: Only these, by their names in the recipe (prealign); all when left out.

    Raises:
        RecipeError: An unknown encoder, fusion, option or name in ``encoders``.
        ShapeError: Parts do not fit together.
    """
    config = _configure(spec, _choose_encoders(spec, encoders), text_config=text_config, image_token_id=0)
    with torch.device("meta"):
        return ManyEyesForConditionalGeneration(config)


def save_checkpoint(model: ManyEyesForConditionalGeneration, processor: ManyEyesProcessor, path: Path) -> str:
    """Write model and processor as a Hugging Face folder, all or nothing.

    Args:
        model: Saved as safetensors, in the dtype that it has.
        processor: Saved beside it.
        path: The folder's name; an older checkpoint there is replaced once the new one is complete.

    Returns:
        The checkpoint's digest. The same weights give the same digest.

    Raises:
        StorageError: No space or no permission; what was at ``path`` is still there.
    """
    needed = sum(tensor.nbytes for tensor in model.state_dict().values())
    with new_folder(path) as folder:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise StorageError(
                f"{path.parent} has {free / 1e6:.0f} MB free",
                f"the checkpoint takes {needed / 1e6:.0f} MB",
                "Free some space or name another folder, then run the same command again.",
            )
        try:
            with _without_progress_bars():
                model.save_pretrained(folder)
        except SafetensorError as error:
            raise StorageError(
                f"{path} cannot be written ({error})", "space and permission to write there", "Free some space."
            ) from error
        processor.save_pretrained(folder)
        return write_manifest(folder)


def write_manifest(folder: Path) -> str:
    """Write ``checkpoint.json`` over every file that is in a folder now.

    Args:
        folder: Holds a whole checkpoint.

    Returns:
        The checkpoint's digest.
    """
    files = {str(file.relative_to(folder)): _sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    manifest = CheckpointManifest(files=files, digest=_digest(files))
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest.digest


def load_checkpoint(
    path: Path, *, spec: ModelSpec | None = None
) -> tuple[ManyEyesForConditionalGeneration, ManyEyesProcessor]:
    """Read what ``save_checkpoint`` wrote, after checking every file's sha256.

    Args:
        path: The folder.
        spec: What the model is to be from here on, for instance at another resolution; as it was saved when left out.

    Returns:
        Model in evaluation mode, in the dtype it was saved in, and its processor.

    Raises:
        CheckpointError: Missing, incomplete or changed, or ``spec`` has other tensors.
        RecipeError: ``spec`` names something that there is not.
        ShapeError: Parts of ``spec`` do not fit together.
    """
    checkpoint_digest(path)
    config = None
    if spec is not None:
        saved = ManyEyesConfig.from_pretrained(path, local_files_only=True)
        config = _configure(spec, spec.encoders, text_config=saved.text_config, image_token_id=saved.image_token_id)
    with _without_progress_bars():
        model, report = ManyEyesForConditionalGeneration.from_pretrained(
            path, config=config, local_files_only=True, dtype="auto", output_loading_info=True
        )
    problems = {key: sorted(map(str, names)) for key, names in report.items() if names}
    if problems:
        raise CheckpointError(
            f"checkpoint {path}: {problems}", "every tensor of the model and no other is needed", "Write it again."
        )
    processor = ManyEyesProcessor.from_pretrained(path, local_files_only=True)
    if spec is not None:
        processor = _make_processor(spec, spec.encoders, model, processor.tokenizer)
    return model.eval(), processor


def checkpoint_digest(path: Path) -> str:
    """The digest of a checkpoint, computed from its files and compared with what ``save_checkpoint`` wrote.

    Files that were put beside the checkpoint later (``stage.json``) do not count.

    Args:
        path: The folder.

    Returns:
        sha256 over the sorted lines ``<path> <sha256>``.

    Raises:
        CheckpointError: Missing, incomplete or changed.
    """
    try:
        manifest = CheckpointManifest.model_validate_json((path / MANIFEST).read_text())
    except OSError as error:
        raise CheckpointError(
            f"{path} has no {MANIFEST} ({error.strerror})", "a checkpoint of ManyEyes is needed", "Check the path."
        ) from error
    except ValidationError as error:
        raise CheckpointError(
            f"{path / MANIFEST} is broken", "files and digest", "Write the checkpoint again."
        ) from error
    absent = [name for name in manifest.files if not (path / name).is_file()]
    if absent:
        raise CheckpointError(f"{path} lacks {', '.join(absent)}", "all its files are needed", "Copy it again, whole.")
    found = {name: _sha256(path / name) for name in manifest.files}
    changed = [name for name, digest in manifest.files.items() if found[name] != digest]
    if changed or _digest(found) != manifest.digest:
        raise CheckpointError(
            f"{path}: {', '.join(changed) or MANIFEST} changed since it was written",
            f"the sha256 in {MANIFEST}",
            "Copy the checkpoint again, or train it again.",
        )
    return manifest.digest


def _configure(
    spec: ModelSpec, chosen: Sequence[EncoderSpec], *, text_config: PreTrainedConfig, image_token_id: int
) -> ManyEyesConfig:
    return ManyEyesConfig(
        text_config=text_config,
        encoders=[_encoder_entry(entry) for entry in chosen],
        fusion=_fusion_entry(spec, chosen),
        projector=spec.projector.model_dump(),
        reinjection=spec.reinjection.model_dump() if spec.reinjection and len(chosen) == len(spec.encoders) else None,
        layout=_layout_entry(spec, chosen),
        shared_pixels=_shared_entry(spec),
        image_token_id=image_token_id,
    )


def _make_processor(
    spec: ModelSpec,
    chosen: Sequence[EncoderSpec],
    model: ManyEyesForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
) -> ManyEyesProcessor:
    return ManyEyesProcessor(
        tokenizer,
        transforms={name: transform.as_dict() for name, transform in _image_transforms(spec, chosen).items()},
        template=spec.chat.template,
        system=spec.chat.system,
        num_image_tokens=model.num_image_tokens,
        image_token_id=model.config.image_token_id,
        max_length=spec.language_model.max_length,
        layout=_processor_layout(model.config),
        sends_image_sizes=model.fusion.uses_image_sizes,
    )


def _choose_encoders(spec: ModelSpec, names: Sequence[str] | None) -> list[EncoderSpec]:
    known = [entry.name for entry in spec.encoders]
    for name in names or ():
        if name not in known:
            raise RecipeError(
                f'encoder is "{name}"', f"the recipe has {', '.join(known)}", did_you_mean(name, known) or "Name one."
            )
    return [entry for entry in spec.encoders if names is None or entry.name in names]


def _layout_entry(spec: ModelSpec, chosen: Sequence[EncoderSpec]) -> dict[str, Any] | None:
    if spec.layout is None or len(chosen) < len(spec.encoders):
        return None
    names = [entry.name for entry in chosen]
    for name in spec.layout.whole:
        if name not in names:
            raise RecipeError(
                f'model.layout.whole names "{name}"',
                f"the encoders are {', '.join(names)}",
                f"{did_you_mean(name, names)}Mend it.",
            )
    tiled = [entry for entry in chosen if entry.name not in spec.layout.whole]
    if not tiled:
        raise RecipeError("model.layout.whole names every encoder", "one must see tiles", "Leave the first one out.")
    size = _shared_size(spec) if spec.preprocess == "shared" else _encoder_size(tiled[0])
    return TokenLayout(**spec.layout.model_dump(), tile_size=size).as_dict()


def _fusion_entry(spec: ModelSpec, chosen: Sequence[EncoderSpec]) -> dict[str, Any]:
    if len(chosen) == len(spec.encoders):
        return spec.fusion.model_dump()
    # Prealign: one encoder has nothing to be fused with; the joint fusion starts after it.
    return FusionSpec(strategy="channel-concat", grid=spec.fusion.grid).model_dump()


def _encoder_entry(entry: EncoderSpec) -> dict[str, Any]:
    return {"name": entry.name, "encoder": entry.encoder, "image_size": _encoder_size(entry), "small": entry.small}


def _encoder_size(entry: EncoderSpec) -> int:
    row = encoder_row(entry.encoder)
    default = row.small_image_size if entry.small else None
    return entry.image_size or default or row.image_size


def _shared_size(spec: ModelSpec) -> int:
    if spec.shared is not None and spec.shared.image_size is not None:
        return spec.shared.image_size
    layout = spec.layout or LayoutSpec()
    # A fixed grid of tiles is cut from the whole image, which then has to be so many times as large.
    grid = layout.image_grid if layout.tiling == "grid" else 1
    return max(_encoder_size(entry) * (1 if entry.name in layout.whole else grid) for entry in spec.encoders)


def _shared_entry(spec: ModelSpec) -> dict[str, Any] | None:
    if spec.preprocess != "shared":
        return None
    shared = spec.shared or SharedSpec()
    return {
        "image_size": _shared_size(spec),
        "align_corners": shared.align_corners,
        "antialias": shared.antialias,
    }


def _image_transforms(spec: ModelSpec, chosen: Sequence[EncoderSpec]) -> dict[str, ImageTransform]:
    if spec.preprocess != "shared":
        return {entry.name: _transform(entry, _encoder_size(entry)) for entry in chosen}
    # An encoder that is prealigned alone sees the pixels that it will see in company.
    name = (spec.shared or SharedSpec()).base or spec.encoders[0].name
    base = next(entry for entry in spec.encoders if entry.name == name)
    return {SHARED: _transform(base, _shared_size(spec))}


def _transform(entry: EncoderSpec, size: int) -> ImageTransform:
    transform = encoder_transform(entry.encoder, image_size=size, fill=entry.fill)
    return transform if entry.fit is None else replace(transform, fit=entry.fit)


def _processor_layout(config: ManyEyesConfig) -> dict[str, Any] | None:
    layout: dict[str, Any] | None = config.layout
    if layout is None or config.shared_pixels is None or layout["tiling"] != "grid":
        return layout
    # The model cuts the tiles of a fixed grid itself, from the one tensor that shows the whole image.
    return {**layout, "whole": [SHARED]}


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(files: dict[str, str]) -> str:
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
