"""Builds, saves and loads the model, and registers it with the Auto classes of transformers.

``match_checkpoint`` says whether a checkpoint is of the model that a recipe describes, field by field.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE, SAFETENSORS_WEIGHTS_FILE_PATTERN
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from manyeyes.encoders import Encoder, encoder_row, load_encoder_weights
from manyeyes.encoders.weights import meta_device, nothing_drawn
from manyeyes.errors import BundleError, CheckpointError, SourceError, StorageError
from manyeyes.model.configuration import MAKES_NO_SENSE, ManyEyesConfig
from manyeyes.model.from_recipe import choose_encoders, configure, image_transforms, make_processor
from manyeyes.model.language_model import (
    check_vocabulary,
    find_image_token_id,
    language_model_config,
    load_language_model,
    load_language_model_config,
    resolve_language_model,
)
from manyeyes.model.modeling import ManyEyesForConditionalGeneration, build_encoders
from manyeyes.model.stored import Stored, find_stored
from manyeyes.processor import ManyEyesProcessor
from manyeyes.recipe import ModelSpec
from manyeyes.runtime.tokenizer import library_errors
from manyeyes.sources import resolve_source
from manyeyes.storage import hash_file, new_folder
from manyeyes.strict import StrictModel
from manyeyes.tokenizer_files import load_tokenizer

# Under these names every model family gives them. The vocabulary is left out: it belongs to the tokenizer, which a
# checkpoint brings along, and a published one may have grown it.
_LANGUAGE_MODEL = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)
# What a recipe has no word for: a converted checkpoint's own sizes of an encoder.
_CHECKPOINTS_OWN = ("architecture",)


@dataclass(frozen=True)
class FieldDifference:
    """A field that a recipe and a checkpoint have otherwise.

    Attributes:
        field: Its path in the recipe.
        recipe: The recipe's value.
        checkpoint: The checkpoint's.
    """

    field: str
    recipe: object
    checkpoint: object

    def __str__(self) -> str:
        values = (json.dumps(value, default=str) for value in (self.recipe, self.checkpoint))
        return f"{self.field} is {' in the recipe and '.join(values)} in the checkpoint"


def find_differences(
    spec: ModelSpec,
    *,
    config: ManyEyesConfig,
    processor: ManyEyesProcessor,
    text_config: PreTrainedConfig | None,
) -> list[FieldDifference]:
    """Fields in which a checkpoint is another model than a recipe's; weights and the tokenizer are not looked at.

    Args:
        spec: What the recipe says.
        config: The checkpoint's.
        processor: The checkpoint's.
        text_config: Of the recipe's language model; None where that cannot be had, and is not compared.

    Raises:
        RecipeError: ``spec`` names something that there is not.
    """
    names = [entry.name for entry in spec.encoders]
    saved = [entry.name for entry in config.encoders]
    if names != saved:
        return [FieldDifference("model.encoders", names, saved)]
    wanted = configure(spec, spec.encoders, text_config=config.text_config, image_token_id=config.image_token_id)
    values, saved_values = wanted.to_dict(), config.to_dict()
    pairs: list[tuple[str, Any, Any]] = [
        *((f"model.encoders.{i}", own, saved_values["encoders"][i]) for i, own in enumerate(values["encoders"])),
        ("model.fusion", values["fusion"], saved_values["fusion"]),
        ("model.reinjection", values["reinjection"], saved_values["reinjection"]),
        ("model.layout", values["layout"], saved_values["layout"]),
        ("model.projector", _projector(values["projector"]), _projector(saved_values["projector"])),
        ("model.shared", values["shared_pixels"], saved_values["shared_pixels"]),
        ("model.chat.template", spec.chat.template, processor.template),
        ("model.chat.system", spec.chat.system, processor.system),
        ("model.language_model.max_length", spec.language_model.max_length, processor.max_length),
    ]
    transforms = image_transforms(spec, spec.encoders)
    if transforms.keys() == processor.transforms.keys():
        for name, transform in transforms.items():
            place = f"model.encoders.{names.index(name)}" if name in names else "model.shared"
            pairs.append((place, transform.as_dict(), processor.image_transforms[name].as_dict()))
    if text_config is not None:
        for name in _LANGUAGE_MODEL:
            ours, theirs = (getattr(found, name, None) for found in (text_config, config.text_config))
            pairs.append((f"model.language_model.source ({name})", ours, theirs))
    found = [difference for place, ours, theirs in pairs for difference in _differ(place, _plain(ours), _plain(theirs))]
    # An encoder's size is in its entry and in its transform.
    sized = {difference.field.removesuffix(".image_size") for difference in found if ".image_size" in difference.field}
    return [d for d in found if not (d.field.endswith(".size") and d.field.removesuffix(".size") in sized)]


def _projector(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "depth" or entry["kind"] == "mlp"}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _differ(place: str, recipe: Any, checkpoint: Any) -> Iterator[FieldDifference]:
    if isinstance(recipe, dict) and isinstance(checkpoint, dict):
        for key in dict.fromkeys([*recipe, *checkpoint]):
            if key not in _CHECKPOINTS_OWN:
                yield from _differ(f"{place}.{key}", recipe.get(key), checkpoint.get(key))
    elif recipe != checkpoint:
        yield FieldDifference(place, recipe, checkpoint)


MANIFEST = "checkpoint.json"
# Of the fields in which a recipe and a checkpoint differ.
_SHOWN_FIELDS = 12
# Of one file of weights, as most of the hub has them.
_FILE_SIZE = "5GB"
# Their names in a file, and their rank in its order.
_SAFETENSORS_DTYPES = {
    torch.bool: ("BOOL", 0),
    torch.uint8: ("U8", 1),
    torch.int8: ("I8", 2),
    torch.int16: ("I16", 3),
    torch.float16: ("F16", 4),
    torch.bfloat16: ("BF16", 5),
    torch.int32: ("I32", 6),
    torch.float32: ("F32", 7),
    torch.float64: ("F64", 8),
    torch.int64: ("I64", 9),
}

AutoConfig.register("manyeyes", ManyEyesConfig, exist_ok=True)
AutoModelForImageTextToText.register(ManyEyesConfig, ManyEyesForConditionalGeneration, exist_ok=True)
AutoProcessor.register(ManyEyesConfig, ManyEyesProcessor, exist_ok=True)


class CheckpointManifest(StrictModel):
    """``checkpoint.json``: what a checkpoint is made of."""

    files: dict[str, str] = Field(description="sha256 of each file of the checkpoint, by its path inside the folder.")
    digest: str = Field(description="sha256 over the sorted lines `<path> <sha256>`; names the checkpoint.")


def build_model(
    spec: ModelSpec,
    *,
    snapshot_path: Path | None,
    seed: int,
    encoders: Sequence[str] | None = None,
    empty: bool = False,
    stored: Stored | None = None,
) -> tuple[ManyEyesForConditionalGeneration, ManyEyesProcessor]:
    """Make a model from a recipe and load its pretrained parts.

    Args:
        spec: What the model is.
        snapshot_path: Folder of the data snapshot, for ``snapshot:`` sources.
        seed: Everything that is not pretrained is drawn from it; torch's global generator is left as it was.
        encoders: Only these, by their names in the recipe (prealign); all when left out.
        empty: The same model on the meta device: no weights are read, and none are drawn.
        stored: Where its files allow it, the language model's weights are not read, and noted in it instead.

    Returns:
        Model in fp32 and evaluation mode, and its processor.

    Raises:
        RecipeError: An unknown encoder, fusion, template or name in ``encoders``.
        SourceError: A pretrained part cannot be had or does not fit.
        ShapeError: Parts do not fit together.
    """
    chosen = choose_encoders(spec, encoders)
    path, pretrained = resolve_language_model(spec.language_model.source, snapshot_path=snapshot_path)
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, load_language_model_config(path))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        language_model = None
        if not empty:
            with _without_progress_bars():
                language_model = _read_or_note(path, pretrained=pretrained, stored=stored)
        text_config = load_language_model_config(path) if language_model is None else language_model.config
        config = configure(
            spec, chosen, text_config=text_config, image_token_id=find_image_token_id(tokenizer, text_config)
        )
        # A skeleton without memory, then the real parts: nothing is drawn or loaded twice.
        with meta_device():
            model = ManyEyesForConditionalGeneration(config)
        if language_model is not None:
            model.language_model = language_model
            model.config.text_config = text_config
            model.encoders = build_encoders(config.encoders)
            model.connect()
        elif stored is not None and pretrained:
            stored.update(find_stored(model.language_model, path, exactly=False))
    for entry in () if empty else chosen:
        row = encoder_row(entry.encoder)
        weights = resolve_source(
            entry.source, snapshot_path=snapshot_path, files=row.files, parts=list(row.parts.values())
        )
        if weights is not None:
            encoder = model.encoders[entry.name]
            assert isinstance(encoder, Encoder)
            load_encoder_weights(encoder, entry.encoder, weights)
    processor = make_processor(spec, chosen, model, tokenizer)
    generation = model.generation_config
    generation.eos_token_id = processor.stop_token_ids
    generation.pad_token_id = tokenizer.pad_token_id
    generation.bos_token_id = tokenizer.bos_token_id
    return model.eval(), processor


def _read_or_note(path: Path, *, pretrained: bool, stored: Stored | None) -> PreTrainedModel:
    if pretrained and stored is not None:
        with nothing_drawn():
            language_model = load_language_model(path, pretrained=False)
        stored.update(find_stored(language_model, path, exactly=False))
        if stored:
            return language_model
    return load_language_model(path, pretrained=pretrained)


def build_processor(
    spec: ModelSpec, *, snapshot_path: Path | None, encoders: Sequence[str] | None = None
) -> ManyEyesProcessor:
    """The processor that ``build_model`` makes, without a model: no weights are read or fetched.

    Args:
        spec: What the model is.
        snapshot_path: Folder of the data snapshot, for ``snapshot:`` sources.
        encoders: As for ``build_model``.

    Raises:
        RecipeError: An unknown encoder, fusion, template or name in ``encoders``.
        SourceError: The language model's configuration or tokenizer cannot be had.
        ShapeError: Parts do not fit together.
    """
    chosen = choose_encoders(spec, encoders)
    path, _ = resolve_language_model(spec.language_model.source, snapshot_path=snapshot_path, fetch_weights=False)
    tokenizer, text_config = load_tokenizer(path), load_language_model_config(path)
    check_vocabulary(tokenizer, text_config)
    config = configure(
        spec, chosen, text_config=text_config, image_token_id=find_image_token_id(tokenizer, text_config)
    )
    with torch.device("meta"):
        model = ManyEyesForConditionalGeneration(config)
    return make_processor(spec, chosen, model, tokenizer)


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
    config = configure(spec, choose_encoders(spec, encoders), text_config=text_config, image_token_id=0)
    with meta_device():
        return ManyEyesForConditionalGeneration(config)


def save_checkpoint(
    model: ManyEyesForConditionalGeneration,
    processor: ManyEyesProcessor,
    path: Path,
    *,
    whole: Callable[[Tensor], Tensor] | None = None,
) -> str:
    """Write model and processor as a Hugging Face folder, all or nothing.

    Args:
        model: Saved as safetensors, in the dtype that it has.
        processor: Saved beside it.
        path: The folder's name; an older checkpoint there is replaced once the new one is complete.
        whole: Gives the whole of a tensor of which the model holds a part. It is asked for one after the other, in the
            order of ``gather_checkpoint``, and each is written before the next.

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
                if whole is None:
                    model.save_pretrained(folder, max_shard_size=_FILE_SIZE)
                else:
                    _save_parts(model, folder, whole)
        except SafetensorError as error:
            raise StorageError(
                f"{path} cannot be written ({error})", "space and permission to write there", "Free some space."
            ) from error
        processor.save_pretrained(folder)
        return write_manifest(folder)


def gather_checkpoint(model: ManyEyesForConditionalGeneration, whole: Callable[[Tensor], Tensor]) -> None:
    """Ask for the same tensors as ``save_checkpoint`` does with ``whole``, and write nothing."""
    for _, tensors in _weight_files(model):
        for tensor in tensors.values():
            whole(tensor)


def _weight_files(model: ManyEyesForConditionalGeneration) -> list[tuple[str, dict[str, Tensor]]]:
    """Files of weights and their tensors in order, as transformers writes them; one that is tied stands once."""
    first = {name for name, _ in model.named_parameters()}
    others = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in others}
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern=SAFETENSORS_WEIGHTS_FILE_PATTERN, max_shard_size=_FILE_SIZE
    )
    files = []
    for file, names in split.filename_to_tensors.items():
        order = sorted(names, key=lambda name: (-_SAFETENSORS_DTYPES[state[name].dtype][1], name))
        files.append((file, {name: state[name] for name in order}))
    return files


def _save_parts(model: ManyEyesForConditionalGeneration, folder: Path, whole: Callable[[Tensor], Tensor]) -> None:
    files = _weight_files(model)
    state = {name: tensor for _, tensors in files for name, tensor in tensors.items()}
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}
    if set(revert_weight_conversion(model, empty)) != set(state):
        # A family whose files hold other tensors than the model (Mixtral's experts): all are needed at once.
        gathered = {name: whole(tensor) for name, tensor in state.items()}
        model.save_pretrained(folder, state_dict=gathered, max_shard_size=_FILE_SIZE)
        return
    model.save_pretrained(folder, state_dict={})
    for file, tensors in files:
        _write_safetensors(folder / file, tensors, whole)
    if len(files) > 1:
        sizes = {"total_parameters": model.num_parameters(), "total_size": sum(each.nbytes for each in state.values())}
        index = {"metadata": sizes, "weight_map": {name: file for file, tensors in files for name in tensors}}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFETENSORS_INDEX_FILE).write_text(text, encoding="utf-8")


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], whole: Callable[[Tensor], Tensor]) -> None:
    """What ``safetensors.torch.save_file`` writes, byte for byte, with one tensor in memory at a time."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype][0],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)))
        file.write(header)
        for tensor in tensors.values():
            file.write(whole(tensor).contiguous().view(-1).view(torch.uint8).numpy().data)


def write_manifest(folder: Path) -> str:
    """Write ``checkpoint.json`` over every file that is in a folder now.

    Args:
        folder: Holds a whole checkpoint.

    Returns:
        The checkpoint's digest.
    """
    files = {str(file.relative_to(folder)): hash_file(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    manifest = CheckpointManifest(files=files, digest=_digest(files))
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest.digest


def load_checkpoint(
    path: Path, *, spec: ModelSpec | None = None, dtype: torch.dtype | None = None
) -> tuple[ManyEyesForConditionalGeneration, ManyEyesProcessor]:
    """Read what ``save_checkpoint`` wrote, after checking every file's sha256.

    Args:
        path: The folder.
        spec: What the model is to be from here on, for instance at another resolution; as it was saved when left out.
        dtype: Of every tensor in memory; the one that ``config.json`` names when left out.

    Returns:
        Model in evaluation mode, and its processor.

    Raises:
        CheckpointError: Missing, incomplete or changed, or ``spec`` has other tensors.
        RecipeError: ``spec`` names something that there is not.
        ShapeError: Parts of ``spec`` do not fit together.
    """
    checkpoint_digest(path)
    config, processor = _load_facts(path, spec)
    with _without_progress_bars(), _sensible(path):
        model, report = ManyEyesForConditionalGeneration.from_pretrained(
            path, config=config, local_files_only=True, dtype=dtype or "auto", output_loading_info=True
        )
    problems = {key: sorted(map(str, names)) for key, names in report.items() if names}
    if problems:
        raise CheckpointError(
            f"checkpoint {path}: {problems}", "every tensor of the model and no other is needed", "Write it again."
        )
    if spec is not None:
        processor = make_processor(spec, spec.encoders, model, processor.tokenizer)
    return model.eval(), processor


def load_noted_checkpoint(
    path: Path, *, spec: ModelSpec | None = None, stored: Stored
) -> tuple[ManyEyesForConditionalGeneration, ManyEyesProcessor]:
    """As ``load_checkpoint``; where the files allow it, weights are not read, and noted in ``stored`` instead."""
    checkpoint_digest(path)
    config, processor = _load_facts(path, spec)
    with _sensible(path), nothing_drawn():
        model = ManyEyesForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    _note(model, path, stored)
    if not stored:
        return load_checkpoint(path, spec=spec)
    if spec is not None:
        processor = make_processor(spec, spec.encoders, model, processor.tokenizer)
    return model.eval(), processor


def _note(model: ManyEyesForConditionalGeneration, path: Path, stored: Stored) -> None:
    if model.config.dtype in (None, torch.float32):
        stored.update(find_stored(model, path, exactly=True))


def load_empty_checkpoint(
    path: Path, *, spec: ModelSpec | None = None, stored: Stored | None = None
) -> tuple[ManyEyesForConditionalGeneration, ManyEyesProcessor]:
    """The model of ``load_checkpoint`` on the meta device: no weights are read, and no checksum is computed."""
    config, processor = _load_facts(path, spec)
    with meta_device():
        model = ManyEyesForConditionalGeneration(config)
    if stored is not None:
        _note(model, path, stored)
    if spec is not None:
        processor = make_processor(spec, spec.encoders, model, processor.tokenizer)
    return model.eval(), processor


def _load_facts(path: Path, spec: ModelSpec | None) -> tuple[ManyEyesConfig, ManyEyesProcessor]:
    with _sensible(path):
        config = ManyEyesConfig.from_pretrained(path, local_files_only=True)
        processor = ManyEyesProcessor.from_pretrained(path, local_files_only=True)
    if spec is not None:
        config = configure(spec, spec.encoders, text_config=config.text_config, image_token_id=config.image_token_id)
    return config, processor


def match_checkpoint(path: Path, specs: Sequence[ModelSpec], *, snapshot_path: Path | None) -> ModelSpec:
    """The first of some models of a recipe that a checkpoint is of.

    Args:
        path: The checkpoint's folder.
        specs: What the model may be; its stages may differ in it. A refusal is about the first.
        snapshot_path: Folder of the data snapshot, for a language model that is there.

    Raises:
        CheckpointError: It is of none of them; names the fields that differ.
        RecipeError: The recipe names something that there is not.
    """
    checkpoint_digest(path)
    with _sensible(path):
        config = ManyEyesConfig.from_pretrained(path, local_files_only=True)
        processor = ManyEyesProcessor.from_pretrained(path, local_files_only=True)
    first: list[FieldDifference] | None = None
    for spec in specs:
        text_config = None
        # What a language model was made from need not be at hand where it is trained on.
        with suppress(SourceError):
            text_config = language_model_config(spec.language_model.source, snapshot_path=snapshot_path)
        found = find_differences(spec, config=config, processor=processor, text_config=text_config)
        if not found:
            return spec
        first = first or found
    fields = [str(difference) for difference in first or ()]
    more = len(fields) - _SHOWN_FIELDS
    shown = "; ".join(fields[:_SHOWN_FIELDS]) + (f"; and {more} more fields" if more > 0 else "")
    raise CheckpointError(
        f"checkpoint {path} is of another model than the recipe's: {shown}",
        "the same model in both, or the stage would not train what the recipe says",
        "Take the recipe that the checkpoint was trained with, give the recipe the checkpoint's values (--set), or "
        "train the earlier stage with this recipe.",
    )


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
        manifest = CheckpointManifest.model_validate_json((path / MANIFEST).read_text(encoding="utf-8"))
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
    found = {name: hash_file(path / name) for name in manifest.files}
    changed = [name for name, digest in manifest.files.items() if found[name] != digest]
    if changed or _digest(found) != manifest.digest:
        raise CheckpointError(
            f"{path}: {', '.join(changed) or MANIFEST} changed since it was written",
            f"the sha256 in {MANIFEST}",
            "Copy the checkpoint again, or train it again.",
        )
    return manifest.digest


@contextmanager
def _sensible(path: Path) -> Iterator[None]:
    """Files with right checksums whose contents make no sense are the user's error."""
    try:
        with library_errors(CheckpointError, found=f"{path}: its tokenizer cannot be read"):
            yield
    except BundleError as error:
        raise CheckpointError(f"{path}: {error.found}", error.needed, "Write the checkpoint again.") from error
    except (OSError, *MAKES_NO_SENSE) as error:
        raise CheckpointError(
            f"checkpoint {path} makes no sense ({type(error).__name__}: {error})",
            "config.json, processor_config.json and a tokenizer as they were written",
            "Write the checkpoint again.",
        ) from error


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _digest(files: dict[str, str]) -> str:
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
