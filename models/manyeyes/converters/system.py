"""What a published system must say about itself to be converted, and where its encoders come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from manyeyes.converters.source import OriginalCheckpoint, read_json, read_json_value
from manyeyes.converters.tables import KeyTable, Shape
from manyeyes.converters.tensor_files import list_tensors
from manyeyes.encoders import encoder_row, encoder_transform
from manyeyes.errors import CheckpointError, SourceError, did_you_mean
from manyeyes.model.configuration import SharedPixelsConfig
from manyeyes.recipe import FusionSpec, ProjectorSpec, ReinjectionSpec
from manyeyes.runtime.preprocess import ImageTransform
from manyeyes.runtime.tiling import TokenLayout
from manyeyes.sources import resolve_source

HUB = "hub"
"""Instead of a folder: every encoder from the repository and revision of its row."""

_PATTERNS = ("*.safetensors", "*.bin", "*.json")


@dataclass(frozen=True)
class FoundEncoder:
    """What is known of an encoder outside the checkpoint.

    Attributes:
        name: Its name inside our model.
        published: What the checkpoint calls it.
        config: Its own configuration: the vision part of its ``config.json``, and over it the fields of
            ``--encoder-config``; None when there is neither.
        preprocessor: Its ``preprocessor_config.json``; None when there is none.
        path: File or folder with its weights; None when it was not found.
    """

    name: str
    published: str
    config: Mapping[str, Any] | None
    preprocessor: Mapping[str, Any] | None
    path: Path | None

    def weights(self) -> Path:
        """Where its weights are.

        Raises:
            SourceError: It was not found; says what to pass.
        """
        if self.path is None:
            raise SourceError(
                f'encoder "{self.name}" is "{self.published}", which is neither in the checkpoint nor on this machine',
                "its weights",
                f"Pass --encoders DIR, a folder that holds it (or a folder {self.name} with it in there), "
                "--encoders hub:<id>@<revision>, or --encoders hub for the published ones.",
            )
        return self.path


class EncoderSources:
    """Finds encoders.

    Args:
        where: ``--encoders``: a folder, ``dir:<folder>``, ``hub:<id>@<revision>``, or ``hub``; None for what the
            checkpoint's configuration names on this machine. Nothing is fetched unless this says so.
        configs: ``--encoder-config``: one object an encoder, by its name in our model or in the checkpoint, or by its
            number, from 0.
        checkpoint: The checkpoint's folder; relative paths in its configuration start there.
    """

    def __init__(self, where: str | None, configs: Mapping[str, Mapping[str, Any]], checkpoint: Path) -> None:
        self._where = where
        self._configs = dict(configs)
        self._checkpoint = checkpoint
        self._asked: set[str] = set()
        self._count = 0

    @property
    def given(self) -> bool:
        """Whether the user says where encoders are."""
        return self._where is not None

    def find(self, name: str, *, published: str, row: str, alone: bool = True, inside: bool = False) -> FoundEncoder:
        """Look for one encoder.

        Args:
            name: Its name inside our model.
            published: What the checkpoint calls it: a hub's id, or a path of its maker's machine.
            row: Row of ENCODERS that it is.
            alone: Whether it is the model's only encoder; the folder of ``--encoders`` may then be its own.
            inside: Whether the checkpoint holds its weights; only its configuration is then looked for, and not on a
                hub.

        Raises:
            SourceError: ``--encoders`` names something that is not there.
        """
        self._asked |= {name, published}
        path = self._path(name, published, row, alone=alone, inside=inside)
        number = str(self._count)
        self._count += 1
        given = self._configs.get(name, self._configs.get(published, self._configs.get(number)))
        own = preprocessor = None
        if path is not None and path.is_dir():
            if (path / "config.json").is_file():
                own = read_json(path / "config.json")
            if (path / "preprocessor_config.json").is_file():
                preprocessor = read_json(path / "preprocessor_config.json")
        config = None if own is None and given is None else {**_vision_part(own), **_vision_part(given)}
        return FoundEncoder(name=name, published=published, config=config, preprocessor=preprocessor, path=path)

    def check_configs(self) -> None:
        """Refuse an object of ``--encoder-config`` that no encoder asked for.

        Raises:
            CheckpointError: Names it, and the encoders that there are.
        """
        for name in self._configs:
            if name not in self._asked and name not in map(str, range(self._count)):
                raise CheckpointError(
                    f'--encoder-config has "{name}"',
                    f"the encoders of this checkpoint are {', '.join(sorted(self._asked))}",
                    did_you_mean(name, self._asked) or "Name one of them.",
                )

    def _path(self, name: str, published: str, row: str, *, alone: bool, inside: bool) -> Path | None:
        where = self._where
        if inside and where is not None and where.startswith(HUB):
            return None
        if where is None:
            named = [Path(published), self._checkpoint / published] if published else []
            return next((path for path in named if path.is_dir()), None)
        if where == HUB:
            known = encoder_row(row)
            return resolve_source(known.source, snapshot_path=None, files=known.files, parts=list(known.parts.values()))
        if where.startswith("hub:"):
            if not alone:
                raise SourceError(
                    f'--encoders is "{where}"',
                    "this checkpoint has several encoders",
                    "Pass --encoders hub for all of them, or a folder with one folder an encoder.",
                )
            return resolve_source(where, snapshot_path=None, parts=_PATTERNS)
        root = Path(where.removeprefix("dir:"))
        if not root.is_dir():
            raise SourceError(f'--encoders is "{where}"', "a folder, hub:<id>@<revision>, or hub", "Check the path.")
        folders = [root / name, root / Path(published).name, root / published, *([root] if alone else [])]
        found = next((folder for folder in folders if folder.is_dir() and any(folder.iterdir())), None)
        if found is None and not inside:
            raise SourceError(
                f'{root} has no folder "{name}" or "{Path(published).name}"',
                f'the encoder "{published}"',
                "Put it there, one folder an encoder.",
            )
        return found


def read_encoder_configs(file: Path) -> dict[str, Mapping[str, Any]]:
    """``--encoder-config``: an object with one object an encoder, or a list of them in the checkpoint's order.

    Raises:
        CheckpointError: Missing, no JSON, or something else.
    """
    values = read_json_value(file)
    if isinstance(values, list):
        values = {str(number): value for number, value in enumerate(values)}
    if not isinstance(values, dict) or not all(isinstance(value, dict) for value in values.values()):
        raise CheckpointError(
            f"{file} holds something else than objects",
            'one object an encoder, such as {"clip": {"num_attention_heads": 16}}, or a list of them',
            "Put each encoder's fields into an object of its own.",
        )
    return values


def _vision_part(config: Mapping[str, Any] | None) -> dict[str, Any]:
    config = config or {}
    # A model of images and text keeps it under vision_config; timm what its network was built with under model_args.
    part = config.get("vision_config", config.get("model_args"))
    return {**config, **part} if isinstance(part, dict) else dict(config)


# Publishers name one thing differently: transformers, timm and detectron2, in this order.
HEADS = ("num_attention_heads", "num_heads", "heads")
EPSILON = ("layer_norm_eps", "norm_eps", "epsilon")
WINDOW = ("window_size", "window")
GLOBAL_BLOCKS = ("global_attn_indexes", "global_block_indexes", "global_blocks")
IMAGE_SIZE = ("image_size", "img_size")
# Pixels a side that the published code runs it at, whatever its configuration says.
INPUT_SIZE = ("input_image_size",)

_FILES = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")


def stated(found: FoundEncoder, names: tuple[str, ...]) -> Any:
    """The first of these fields that the encoder's configuration has; None when it has none.

    Args:
        found: The encoder.
        names: What publishers call the field.
    """
    config = found.config or {}
    return next((config[name] for name in names if config.get(name) is not None), None)


def told_or_published(
    found: FoundEncoder, names: tuple[str, ...], *, row: str, field: str, sizes: Mapping[str, Any]
) -> Any:
    """A fact that no tensor tells: from the encoder's configuration, else from the row, where all sizes are the row's.

    Args:
        found: The encoder.
        names: What publishers call the fact.
        row: Row of ENCODERS that it is, at any size.
        field: What the row's architecture calls it.
        sizes: What the tensors tell, by the names of the row's architecture.

    Raises:
        CheckpointError: Neither; says what to pass.
    """
    value = stated(found, names)
    if value is not None:
        return value
    published = encoder_row(row).architecture
    if all(published.get(name) == size for name, size in sizes.items()):
        return published[field]
    told = ", ".join(f"{name} {size}" for name, size in sizes.items())
    raise CheckpointError(
        f'encoder "{found.name}" ("{found.published}") has {told}, unlike the published one',
        f"its {names[0]}, which no tensor tells",
        f'Pass --encoder-config FILE.json with {{"{found.name}": {{"{names[0]}": ..., ...}}}}, the fields of its own '
        "configuration.",
    )


def changed(row: str, architecture: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fields of an architecture that differ from the row's own."""
    own = {**(defaults or {}), **encoder_row(row).architecture}
    return {key: value for key, value in architecture.items() if own.get(key) != value}


def published_size(row: str, field: str) -> int:
    """A whole number of a row's architecture."""
    value = encoder_row(row).architecture[field]
    assert isinstance(value, int), field
    return value


def count_numbered(shapes: Mapping[str, Shape], prefix: str) -> int:
    """How many numbered children a prefix such as ``blocks.`` has.

    Args:
        shapes: Stored tensors.
        prefix: Up to and with the dot before the number.
    """
    return len({key.removeprefix(prefix).partition(".")[0] for key in shapes if key.startswith(prefix)})


def shape_of(shapes: Mapping[str, Shape], key: str, rank: int, *, found: FoundEncoder) -> Shape:
    """The shape of a tensor that an encoder cannot be without.

    Raises:
        CheckpointError: Not there, or of another rank.
    """
    shape = shapes.get(key)
    if shape is None or len(shape) != rank:
        raise CheckpointError(
            f'encoder "{found.name}" ("{found.published}") has '
            + (f'no "{key}"' if shape is None else f'"{key}" {list(shape)}'),
            f"a tensor of {rank} dimensions",
            "Check that the weights belong to config.json, or fetch them again.",
        )
    return shape


def weights_file(found: FoundEncoder, *, row: str) -> Path:
    """The one file with an encoder's weights outside the checkpoint.

    Raises:
        SourceError: It cannot be had; says what to pass.
    """
    path = found.weights()
    if path.is_file():
        return path
    names = dict.fromkeys([*encoder_row(row).files, *_FILES])
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise SourceError(
            f'{path} for encoder "{found.name}" has no weights', f"one of {', '.join(names)}", "Put them there."
        )
    return file


def outside_shapes(file: Path) -> dict[str, Shape]:
    """Shapes of the tensors in an encoder's own file, without reading one.

    Raises:
        CheckpointError: It cannot be read.
    """
    return {key: stored.shape for key, stored in list_tensors(file).items()}


def pixels_of(
    row: str,
    *,
    image_size: int,
    fit: Literal["stretch", "crop", "pad"],
    fill: tuple[int, int, int] | None = None,
) -> ImageTransform:
    """How a row wants its pixels, with another fit."""
    return replace(encoder_transform(row, image_size=image_size, fill=fill), fit=fit)


@dataclass(frozen=True)
class EncoderPlan:
    """One encoder of a published checkpoint.

    Attributes:
        name: Its name inside our model: keys ``encoders.<name>.net.*``, pixels ``pixel_values.<name>``.
        row: Row of ENCODERS that it is, at any size.
        image_size: Pixels a side.
        architecture: Replaces parts of the row's own architecture; empty for the true size.
        transform: How it wants its pixels; not used with ``Plan.shared_pixels``.
        weights: File or folder with its published weights, which then are read through its family; None when they are
            in the checkpoint and ``Plan.keys`` has rules for them.
    """

    name: str
    row: str
    image_size: int
    transform: ImageTransform
    architecture: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None


@dataclass(frozen=True)
class Plan:
    """A published checkpoint as our model.

    Attributes:
        text_config: ``config.json`` of the language model, with ``model_type``.
        encoders: In the order of their channels.
        fusion: As in a recipe.
        projector: As in a recipe.
        keys: Rules for every tensor of ours that no encoder brings along, and for every stored key.
        template: Row of CHAT_TEMPLATES.
        reinjection: As in a recipe; None where the language model does not look back.
        layout: How an image becomes tiles; None for one tile.
        shared_pixels: What every encoder's input is made from; None where each has its own.
        shared_transform: With ``shared_pixels``: how the one tensor is made.
        processor_layout: The processor's layout where it differs from ``layout``; None where it does not.
        image_marks: Text before and after each image, such as ``<im_start>`` and ``<im_end>``.
        new_tokens: Tokens that the published loader adds to the tokenizer, in order, where it lacks them.
        max_length: Tokens that a conversation may have.
    """

    text_config: Mapping[str, Any]
    encoders: tuple[EncoderPlan, ...]
    fusion: FusionSpec
    projector: ProjectorSpec
    keys: KeyTable
    template: str
    reinjection: ReinjectionSpec | None = None
    layout: TokenLayout | None = None
    shared_pixels: SharedPixelsConfig | None = None
    shared_transform: ImageTransform | None = None
    processor_layout: TokenLayout | None = None
    image_marks: tuple[str, str] = ("", "")
    new_tokens: tuple[str, ...] = ()
    max_length: int = 2048


@dataclass(frozen=True)
class System:
    """One published layout.

    Attributes:
        name: As the report says it.
        recognises: Whether a ``config.json`` is of this system, by its fields; never by the name of a path.
        plan: Reads configurations and the shapes of tensors, no tensor itself. Raises ``CheckpointError`` for what our
            model cannot do, ``SourceError`` for an encoder that cannot be had.
        describes: What ``recognises`` looks for, in words; the message about an unknown system lists it.
    """

    name: str
    recognises: Callable[[Mapping[str, Any]], bool]
    plan: Callable[[OriginalCheckpoint, EncoderSources], Plan]
    describes: str
