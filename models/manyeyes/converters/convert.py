"""From a published checkpoint to one of ours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from manyeyes.converters import SYSTEMS
from manyeyes.converters.source import OriginalCheckpoint, open_checkpoint
from manyeyes.converters.system import EncoderPlan, EncoderSources, Plan, System, read_encoder_configs
from manyeyes.converters.tables import Resolution, Shape
from manyeyes.converters.tensor_files import MAX_SHARD_BYTES, Planned, write_tensors
from manyeyes.encoders import Encoder, fit_encoder_weights
from manyeyes.encoders.weights import meta_device
from manyeyes.errors import BundleError, CheckpointError, RecipeError, did_you_mean
from manyeyes.model import ManyEyesConfig, ManyEyesForConditionalGeneration, write_manifest
from manyeyes.model.configuration import MAKES_NO_SENSE, EncoderConfig
from manyeyes.model.language_model import check_vocabulary, find_image_token_id
from manyeyes.processor import SHARED, ManyEyesProcessor
from manyeyes.runtime.preprocess import ImageTransform
from manyeyes.runtime.templates import CHAT_TEMPLATES
from manyeyes.sources import resolve_source
from manyeyes.storage import new_folder
from manyeyes.strict import StrictModel
from manyeyes.tokenizer_files import load_published_tokenizer

REPORT = "conversion.json"
_FETCHED = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.jinja")
_ENCODER_KEY = "encoders."


class ConversionReport(StrictModel):
    """``conversion.json``: where every tensor of a converted checkpoint came from."""

    system: str = Field(description="Published layout that it was.")
    template: str = Field(description="Chat template; a row of CHAT_TEMPLATES.")
    dtype: str = Field(
        description="That the model is loaded in: the one that most bytes of the checkpoint have. On disk every tensor "
        "keeps the dtype that it has at its source; one that a LoRA adapter changes is fp32."
    )
    encoders: dict[str, str] = Field(description="Per encoder `checkpoint`, or the folder or file it came from.")
    converted: dict[str, list[str]] = Field(description="Per tensor of ours the stored keys that it was made of.")
    left: dict[str, str] = Field(description="Stored keys without a place here: `unused: why` or `recomputed: why`.")
    adapter: dict[str, str] = Field(description="Keys of a LoRA adapter, and the stored key that each one changes.")
    notes: list[str] = Field(description="What else a reader should know.")


def convert(
    source: str | Path,
    out: Path,
    *,
    encoders: str | None = None,
    encoder_configs: Path | None = None,
    base: str | Path | None = None,
    template: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Callable[[str], None] | None = None,
) -> ConversionReport:
    """Convert a published checkpoint.

    Memory stays below twice the largest shard: tensors are read and written one at a time. An encoder from elsewhere
    is read whole.

    Args:
        source: A folder, or ``hub:<id>@<revision>``.
        out: Where our checkpoint appears when it is complete.
        encoders: Where encoders are that the checkpoint does not hold: a folder, ``hub:<id>@<revision>``, or ``hub``.
        encoder_configs: A JSON file with one object an encoder, by name or as a list in the checkpoint's order: fields
            of its own configuration.
        base: Folder or ``hub:`` of the model that a LoRA adapter or a projector was trained on.
        template: Row of CHAT_TEMPLATES, where the checkpoint was trained on another than its configuration tells.
        max_shard_bytes: Largest file to write.
        on_progress: Called with each of our keys before it is made.

    Returns:
        What ``conversion.json`` says.

    Raises:
        CheckpointError: Unknown system, unreadable file, or a key that is missing, left over, misshapen or refused.
        SourceError: An encoder or a source that cannot be had.
        RecipeError: No such template.
        StorageError: No space or no permission. Nothing half-written is left, whatever the error.
    """
    folder = _local(source)
    _check_out(out, folder)
    checkpoint = open_checkpoint(folder, base=None if base is None else _local(base))
    with _sensible(folder / "config.json"):
        system = recognise(checkpoint)
    configs = read_encoder_configs(encoder_configs) if encoder_configs is not None else {}
    found = EncoderSources(encoders, configs, folder)
    with _sensible(folder / "config.json"):
        plan = system.plan(checkpoint, found)
        _check_layers(plan, checkpoint)
        found.check_configs()
        name = _choose_template(template, plan)
        tokenizer, notes = _load_tokenizer(checkpoint, plan)
        text_config = AutoConfig.for_model(**plan.text_config)
        config = config_of_plan(plan, image_token_id=find_image_token_id(tokenizer, text_config))
        with meta_device():
            model = ManyEyesForConditionalGeneration(config)
    brought = {entry.name: entry for entry in plan.encoders if entry.weights is not None}
    wanted = _shapes(model)
    ours = {key: shape for key, shape in wanted.items() if _owner(key) not in brought}
    resolution = plan.keys.resolve(ours, checkpoint.shapes(), name=str(folder))
    dtype = _main_dtype(checkpoint, resolution)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    processor = _make_processor(plan, model, tokenizer, name)
    report = ConversionReport(
        system=system.name,
        template=name,
        dtype=str(dtype).removeprefix("torch."),
        encoders={entry.name: str(entry.weights or "checkpoint") for entry in plan.encoders},
        converted={key: list(resolution.assignments[key].sources) for key in ours},
        left=dict(resolution.left),
        adapter=dict(checkpoint.adapter_keys),
        notes=[*checkpoint.notes, *notes],
    )
    with new_folder(out) as new:
        _write_weights(new, checkpoint, resolution, wanted, _Brought(model, brought), max_shard_bytes, on_progress)
        config.save_pretrained(new)
        _generation_config(processor).save_pretrained(new)
        processor.save_pretrained(new)
        (new / REPORT).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        write_manifest(new)
    checkpoint.release()
    return report


def recognise(checkpoint: OriginalCheckpoint) -> System:
    """The system that a checkpoint's configuration is of.

    Raises:
        CheckpointError: None; lists those known.
    """
    config = checkpoint.config()
    for system in SYSTEMS.values():
        if system.recognises(config):
            return system
    known = "; ".join(f"{system.name} ({system.describes})" for system in SYSTEMS.values())
    raise CheckpointError(
        f"{checkpoint.path / 'config.json'} has model_type {config.get('model_type')!r} "
        f"and architectures {config.get('architectures')!r}",
        f"one of the systems {known}",
        "Check that the folder is a whole published checkpoint of one of them.",
    )


class _Brought:
    """Encoders that do not come out of the checkpoint, one in memory at a time."""

    def __init__(self, model: ManyEyesForConditionalGeneration, plans: Mapping[str, EncoderPlan]) -> None:
        self._model = model
        self._plans = plans
        self.release()

    def __contains__(self, key: str) -> bool:
        return _owner(key) in self._plans

    def release(self) -> None:
        self._name = ""
        self._state: dict[str, Tensor] = {}

    def tensor(self, key: str) -> Tensor:
        name = _owner(key)
        if name != self._name:
            self._state = {}
            plan, encoder = self._plans[name], self._model.encoders[name]
            assert isinstance(encoder, Encoder)
            assert plan.weights is not None
            self._state = fit_encoder_weights(encoder, plan.row, plan.weights)
            self._name = name
        return self._state[key.removeprefix(f"{_ENCODER_KEY}{name}.net.")]


def _write_weights(
    folder: Path,
    checkpoint: OriginalCheckpoint,
    resolution: Resolution,
    wanted: Mapping[str, Shape],
    brought: _Brought,
    max_shard_bytes: int,
    on_progress: Callable[[str], None] | None,
) -> None:
    stored = checkpoint.keys()
    places = {key: place for place, key in enumerate(stored)}

    def place(key: str) -> tuple[bool, int]:
        # As files hold them, so that each is opened once; encoders from elsewhere behind them.
        sources = resolution.assignments[key].sources if key not in brought else ()
        return (key in brought, min((places[source] for source in sources), default=0))

    def read(key: str) -> Tensor:
        if key in brought:
            return brought.tensor(key)
        assignment = resolution.assignments[key]
        return assignment.make([checkpoint.tensor(source) for source in assignment.sources])

    def dtype_of(key: str) -> torch.dtype:
        # An encoder in fp32 beside half-precision shards would change by more than two implementations may differ.
        if key in brought:
            return brought.tensor(key).dtype
        assignment = resolution.assignments[key]
        if assignment.dtype is not None:
            return assignment.dtype
        sources = [stored[source] for source in assignment.sources]
        return functools.reduce(torch.promote_types, (source.result_dtype for source in sources))

    planned = {key: Planned(wanted[key], dtype_of(key)) for key in sorted(wanted, key=place)}
    brought.release()
    write_tensors(folder, planned, read, max_shard_bytes=max_shard_bytes, on_progress=on_progress)


def _local(source: str | Path) -> Path:
    if isinstance(source, Path):
        return source
    if not source.startswith("hub:"):
        return Path(source.removeprefix("dir:"))
    path = resolve_source(source, snapshot_path=None, parts=_FETCHED)
    assert path is not None
    return path


def _check_out(out: Path, source: Path) -> None:
    if not out.exists():
        return
    ours = (out / "checkpoint.json").is_file()
    empty = out.is_dir() and not any(out.iterdir())
    if out.resolve() == source.resolve() or not (ours or empty):
        raise CheckpointError(
            f"{out} exists and is no checkpoint of ManyEyes", "a new folder, or one to replace", "Name another."
        )


def _choose_template(template: str | None, plan: Plan) -> str:
    name = template or plan.template
    if name not in CHAT_TEMPLATES:
        raise RecipeError(
            f'--template is "{name}"', "no such template", did_you_mean(name, CHAT_TEMPLATES) or "See docs/chat.md."
        )
    return name


@contextmanager
def _sensible(config: Path) -> Iterator[None]:
    """A published ``config.json`` has no schema: what a value that makes no sense does depends on its field."""
    try:
        yield
    except BundleError as error:
        raise CheckpointError(f"{config}: {error.found}", error.needed, "Fetch it again.") from error
    except MAKES_NO_SENSE as error:
        raise CheckpointError(
            f"{config} makes no sense ({type(error).__name__}: {error})",
            "the configuration that was published with these weights",
            "Fetch it again.",
        ) from error


def _check_layers(plan: Plan, checkpoint: OriginalCheckpoint) -> None:
    # Even on the meta device each layer takes time and memory.
    layers, stored = plan.text_config.get("num_hidden_layers"), len(checkpoint.shapes())
    if isinstance(layers, int) and layers > stored:
        raise CheckpointError(
            f"config.json has num_hidden_layers {layers}", f"the files hold {stored} tensors", "Fetch it again."
        )


def _load_tokenizer(checkpoint: OriginalCheckpoint, plan: Plan) -> tuple[PreTrainedTokenizerBase, list[str]]:
    tokenizer = load_published_tokenizer(checkpoint.tokenizer_path, model_type=str(plan.text_config["model_type"]))
    rows = int(plan.text_config["vocab_size"])
    missing = [token for token in plan.new_tokens if token not in tokenizer.get_vocab()]
    needed = [token for token in missing if token in plan.image_marks]
    if needed and len(tokenizer) + len(missing) > rows:
        raise CheckpointError(
            f"the tokenizer lacks {', '.join(needed)}, and the embedding table has {rows} rows",
            f"{len(tokenizer) + len(missing)} rows",
            "Fetch the tokenizer that belongs to the weights.",
        )
    notes = []
    if missing and len(tokenizer) + len(missing) <= rows:
        # As the published loader does: behind the tokenizer's own, in this order.
        tokenizer.add_tokens(list(missing), special_tokens=True)
        notes.append(f"{', '.join(missing)} added to the tokenizer, as the published loader does")
    check_vocabulary(tokenizer, AutoConfig.for_model(**plan.text_config))
    return tokenizer, notes


def config_of_plan(plan: Plan, *, image_token_id: int) -> ManyEyesConfig:
    """The configuration of our model for a plan."""
    text_config = AutoConfig.for_model(**plan.text_config)
    return ManyEyesConfig(
        text_config=text_config,
        encoders=tuple(
            EncoderConfig(
                name=entry.name,
                encoder=entry.row,
                image_size=entry.image_size,
                small=False,
                architecture=dict(entry.architecture),
            )
            for entry in plan.encoders
        ),
        fusion=plan.fusion,
        projector=plan.projector,
        reinjection=plan.reinjection,
        layout=plan.layout,
        shared_pixels=plan.shared_pixels,
        image_token_id=image_token_id,
    )


def _transforms(plan: Plan) -> dict[str, ImageTransform]:
    if plan.shared_transform is not None:
        return {SHARED: plan.shared_transform}
    return {entry.name: entry.transform for entry in plan.encoders}


def _make_processor(
    plan: Plan, model: ManyEyesForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, template: str
) -> ManyEyesProcessor:
    layout = plan.processor_layout or plan.layout
    return ManyEyesProcessor(
        tokenizer,
        transforms={name: transform.as_dict() for name, transform in _transforms(plan).items()},
        template=template,
        num_image_tokens=model.num_image_tokens,
        image_token_id=model.config.image_token_id,
        max_length=plan.max_length,
        layout=None if layout is None else layout.as_dict(),
        sends_image_sizes=model.fusion.uses_image_sizes,
        image_marks=list(plan.image_marks) if any(plan.image_marks) else None,
    )


def _generation_config(processor: ManyEyesProcessor) -> GenerationConfig:
    tokenizer = processor.tokenizer
    try:
        stops = processor.stop_token_ids
    except RecipeError:
        # A tokenizer without the template's own mark: its end of sequence ends an answer.
        stops = [tokenizer.eos_token_id]
    return GenerationConfig(
        eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )


def _owner(key: str) -> str:
    return key.removeprefix(_ENCODER_KEY).partition(".net.")[0] if key.startswith(_ENCODER_KEY) else ""


def _shapes(model: ManyEyesForConditionalGeneration) -> dict[str, Shape]:
    """Shape of every tensor that is saved: one of each group of tied ones."""
    model.tie_weights()
    tensors: Mapping[str, Any] = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for key, tensor in tensors.items():
        first.setdefault(id(tensor), key)
    return {key: tuple(tensors[key].shape) for key in first.values()}


def _main_dtype(checkpoint: OriginalCheckpoint, resolution: Resolution) -> torch.dtype:
    stored, sizes = checkpoint.keys(), dict[torch.dtype, int]()
    for assignment in resolution.assignments.values():
        for source in assignment.sources:
            tensor = stored[source]
            if tensor.dtype.is_floating_point:
                count = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + count
    return max(sizes, key=lambda dtype: sizes[dtype])
