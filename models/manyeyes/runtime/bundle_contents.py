"""The files of a bundle: their names, whether they are as the manifest says, and what the JSON files may hold.

Types are strict (a number in quotes is no number), no other fields are allowed, and every value has its range: somebody
else may have written the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from manyeyes.errors import BundleError, did_you_mean
from manyeyes.storage import hash_file, parse_json
from manyeyes.strict import StrictModel

FORMAT_VERSION: Literal[1] = 1
MAX_SIDE = 16_384
"""Most pixels a side of an encoder's input; published ones have up to 1,536."""

_MOST_TOKENS = 2**31 - 1
_LONGEST_NAME = 255  # of a file, in bytes, on every common file system
_Model = TypeVar("_Model", bound=BaseModel)


class _Exact(StrictModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


GRAPHS = "onnx"
"""Folder of the graphs, where other runtimes look for them; older bundles have no folders."""


def _plain_name(name: str) -> str:
    plain = name.removeprefix(f"{GRAPHS}/")
    if plain in ("", ".", "..") or set(plain) & set("/\\\0") or len(plain.encode("utf-8", "replace")) > _LONGEST_NAME:
        raise ValueError(f"a plain file name of at most {_LONGEST_NAME} bytes is needed, alone or in {GRAPHS}/")
    return name


FileName = Annotated[str, AfterValidator(_plain_name)]
_Token = Annotated[int, Field(ge=0, le=_MOST_TOKENS)]
_Byte = Annotated[int, Field(ge=0, le=255)]
_Mean = Annotated[float, Field(ge=-255, le=255)]
_Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]
_Deviation = Annotated[float, Field(gt=0, le=255)]
_Tiles = Annotated[int, Field(ge=1, le=16)]


class BundleFile(_Exact):
    """One file of a bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="sha256 of the file, hexadecimal.")
    bytes: int = Field(ge=0, description="Size in bytes.")


class GraphTensor(_Exact):
    """One input or output of a graph."""

    name: str = Field(description="Its name in the graph.")
    dtype: str = Field(description="Element type as numpy names it: float32, int64.")
    shape: list[Annotated[int, Field(ge=0)] | str] = Field(description="Sizes; a dynamic axis has a name instead.")


class GraphSignature(_Exact):
    """What a graph takes and gives."""

    inputs: list[GraphTensor] = Field(description="Inputs, in the graph's order.")
    outputs: list[GraphTensor] = Field(description="Outputs, in the graph's order.")


class BundleParity(_Exact):
    """How closely the bundle follows torch; parity.json has the rest."""

    items: int = Field(ge=0, description="Questions compared.")
    token_match: float = Field(ge=0, le=1, description="Share of questions whose whole token sequence is equal.")
    max_abs_logit: float = Field(ge=0, description="Largest absolute difference of a first-token logit.")
    mean_abs_logit: float = Field(ge=0, description="Mean absolute difference of first-token logits.")


class ModelFacts(_Exact):
    """Size and cost of a model."""

    parameters: int = Field(gt=0, description="Of the whole model, each once.")
    parts: dict[str, int] = Field(
        description="The same by part: `encoders.NAME`, fusion, projector, language_model, reinjection."
    )
    encoders: list[str] = Field(min_length=1, description="Names of the vision encoders, in the model's order.")
    visual_tokens: int = Field(
        gt=0, description="Of one image in the sequence, newlines included; with tiles, of the largest image."
    )
    flops_per_sample: int = Field(
        gt=0,
        description="One forward pass over one image and text_tokens; a multiplication and an addition count as two.",
    )
    text_tokens: int = Field(gt=0, description="Tokens of text in that sample.")


GraphName = Literal["vision", "embed", "decoder"]
Precision = Literal["fp32", "fp16", "int8", "int4"]
DEFAULT_VARIANT = "default"
"""The variant that is loaded where none is named."""


class BundleVariant(_Exact):
    """One choice of precisions. Variants share the files that are equal in them."""

    precision: dict[GraphName, Precision] = Field(description="Precision of each graph's weights.")
    graphs: dict[GraphName, Annotated[list[FileName], Field(min_length=1)]] = Field(
        description="By graph: its file, then the files that hold its weights."
    )
    prefill: FileName | None = Field(
        default=None,
        exclude_if=lambda file: file is None,
        description="A second graph of the decoder's weights, quicker than it for many tokens on a CPU; where the "
        "decoder is in int4.",
    )
    parity: BundleParity | None = Field(default=None, description="Comparison with torch; null until it is measured.")

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        absent = sorted(set(get_args(GraphName)) - (self.precision.keys() & self.graphs.keys()))
        if absent:
            raise ValueError(f"no {', '.join(absent)}: each variant names all graphs")
        return self


class BundleManifest(_Exact):
    """``manifest.json``: what a bundle is, where it comes from, and the checksum of every file."""

    format_version: Literal[1] = Field(default=FORMAT_VERSION, description="Version of this layout.")
    recipe: str = Field(description="Name of the recipe.")
    recipe_digest: str = Field(description="sha256 of what the export was given of the recipe, hexadecimal.")
    data_md5: str = Field(description="md5 of the data snapshot, 32 hexadecimal digits.")
    code_digest: str = Field(description="Digest of the library that trained and exported.")
    checkpoint_digest: str = Field(description="sha256 over the checkpoint's files, hexadecimal.")
    opset: int = Field(ge=18, description="ONNX operator set.")
    precision: Literal["fp32"] | dict[GraphName, Precision] = Field(
        description="Precision of the default variant's weights: fp32 in all graphs, or by graph."
    )
    files: dict[FileName, BundleFile] = Field(description="Every file but this one, by name.")
    graphs: dict[FileName, GraphSignature] = Field(description="Inputs and outputs of each graph, by file name.")
    ours_alone: list[str] | None = Field(
        default=None,
        description="What other runtimes do not know of this model; empty where transformers.js opens the bundle as a "
        "LlavaForConditionalGeneration. Null in older bundles.",
    )
    digest: str = Field(description="Digest of the bundle: sha256 over the names and sha256s of its files.")
    model: ModelFacts | None = Field(default=None, description="Size and cost of the model; null in older bundles.")
    parity: BundleParity | None = Field(
        default=None, description="Comparison of the default variant with torch; null until it is measured."
    )
    variants: dict[str, BundleVariant] = Field(
        default={}, description="By name; `default` is loaded where none is named. Empty in older bundles."
    )


class EncoderPixels(_Exact):
    """How one encoder wants its pixels."""

    size: _Side = Field(description="Side of the square input, in pixels.")
    mean: tuple[_Mean, _Mean, _Mean] = Field(description="Mean of each RGB channel, on a scale of 0 to 1.")
    std: tuple[_Deviation, _Deviation, _Deviation] = Field(
        description="Standard deviation of each RGB channel, scale of 0 to 1."
    )
    resample: Literal["bicubic", "bilinear"] = Field(default="bicubic", description="Resizing filter, antialiased.")
    fit: Literal["stretch", "crop", "pad"] = Field(
        default="pad", description="What happens to an image that is not square."
    )
    fill: tuple[_Byte, _Byte, _Byte] | None = Field(
        default=None, description="Colour around a padded image, RGB, 0 to 255; null for the mean colour."
    )


class ImageLayout(_Exact):
    """How an image becomes tiles, and its visual tokens a sequence."""

    tiling: Literal["none", "anyres", "grid"] = Field(
        description="none: one tile. anyres: the image as a whole, then the tiles of the grid among pinpoints that "
        "suits it best. grid: the image as a whole, then image_grid x image_grid tiles."
    )
    pinpoints: list[tuple[_Tiles, _Tiles]] = Field(
        min_length=1, max_length=256, description="For anyres: columns and rows of the grids to choose from."
    )
    image_grid: _Tiles = Field(description="For grid: tiles a side.")
    newline: bool = Field(description="Whether a learned token ends each row of visual tokens.")
    newline_at: Literal["rows", "end"] = Field(
        description="rows: as newline says. end: one such token after the image's last token instead."
    )
    unpad: bool = Field(description="Whether rows and columns that show nothing but padding are left out.")
    whole: list[str] = Field(description="Encoders that see the whole image once, whatever the tiling.")
    tile_size: _Side = Field(description="Side of a tile of the first tiled encoder, in pixels.")


class SharedInput(_Exact):
    """How the vision graph makes each encoder's input from its one input: bilinear interpolation, in fp32."""

    align_corners: bool = Field(description="Whether corner pixels keep the place of their centres.")
    antialias: bool = Field(description="Whether the filter is widened when shrinking.")
    encoder_sizes: dict[str, _Side] = Field(description="Side of each encoder's input in pixels, by its name.")


class PreprocessFile(_Exact):
    """``preprocess.json``: from image files to the vision graph's inputs."""

    mode: Literal["independent", "shared"] = Field(
        description="independent: each encoder's input is resized from the uint8 image. shared: the graph takes one "
        "input, named shared, and makes each encoder's from it."
    )
    encoders: dict[str, EncoderPixels] = Field(min_length=1, description="By the name of the graph's input.")
    shared: SharedInput | None = Field(default=None, description="Inside the graph, with mode shared; else null.")
    layout: ImageLayout | None = Field(
        default=None, description="Tiles and the order of their tokens; null for one tile, its tokens as they are."
    )

    @model_validator(mode="after")
    def _inputs_fit(self) -> Self:
        if (self.mode == "shared") != (set(self.encoders) == {"shared"}):
            raise ValueError(f"mode {self.mode!r} does not go with inputs for {', '.join(self.encoders)}")
        unknown = sorted(set(self.layout.whole) - set(self.encoders)) if self.layout is not None else []
        if unknown and self.mode == "independent":
            raise ValueError(f"layout.whole names {', '.join(unknown)}, which encoders does not")
        return self


class TemplateText(_Exact):
    """The text around turns; ``manyeyes.runtime.templates.ChatTemplate`` says how it is put together."""

    name: str = Field(min_length=1, description="A row of CHAT_TEMPLATES, or tokenizer.")
    system: str = Field(default="", description="System text.")
    system_prefix: str = Field(default="", description="Before the system text.")
    system_suffix: str = Field(default="", description="After the system text.")
    human_prefix: str = Field(default="", description="Before a question.")
    human_suffix: str = Field(default="", description="After a question.")
    gpt_prefix: str = Field(default="", description="Where the generation prompt ends.")
    gpt_lead: str = Field(default="", description="Before an answer; the model writes it.")
    gpt_end: str = Field(default="", description="Ends an answer.")
    gpt_after: str = Field(default="", description="After the end.")
    images_only: bool = Field(default=False, description="Of a question only its images are kept.")
    start: str = Field(default="", description="Before everything else.")
    between: str = Field(default="", description="After an exchange that another one follows.")
    system_inside: bool = Field(default=False, description="The system text stands inside the first question.")
    takes_system: bool = Field(default=True, description="Whether there may be a system text.")
    adds_bos: bool = Field(default=True, description="What the tokenizer puts in front of a text comes first.")
    trims: bool = Field(default=False, description="White space around each text is left out.")
    stop: str = Field(default="", description="Ends generation, where that is not gpt_end.")
    stop_splits: bool = Field(default=False, description="The end is ordinary characters; its first token counts.")
    asked_as: str = Field(default="", description="Row of CHAT_TEMPLATES that asks for an answer; empty for this one.")
    image_prefix: str = Field(default="", description="Before each image.")
    image_suffix: str = Field(default="", description="After each image.")


class ChatFile(_Exact):
    """``chat.json``: from a question to tokens."""

    template: TemplateText = Field(description="The text around turns.")
    system: str | None = Field(default=None, description="Replaces the template's system text; null keeps it.")
    image_token_id: _Token = Field(description="Stands at visual tokens; never looked up in the embedding table.")
    image_tokens: int = Field(gt=0, le=_MOST_TOKENS, description="Visual tokens an image; with a layout, a tile.")
    max_length: int = Field(gt=0, le=_MOST_TOKENS, description="Most tokens, question, image and answer together.")
    stop_token_ids: list[_Token] = Field(min_length=1, description="Token ids that end an answer.")


def read_part(model: type[_Model], values: Any, *, what: str) -> _Model:
    """Check JSON values against their model.

    Args:
        model: What they must be.
        values: From a JSON file.
        what: Their name, for messages.

    Raises:
        BundleError: They are something else; names the first field that is wrong.
    """
    try:
        # In its JSON mode pydantic takes a list for a tuple, and a whole number for a float, and nothing else.
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        given = problem["input"]
        shown = "" if problem["type"] == "missing" else f" {given!r:.60}"
        raise BundleError(
            f"{what} has {place + shown if place else f'{type(given).__name__}{shown}'} ({problem['msg']})",
            "fields as docs/formats.md lists them are needed",
            "Export the bundle again, or update manyeyes.",
        ) from error
    except (RecursionError, TypeError, ValueError) as error:
        raise BundleError(f"{what} cannot be read ({error})", "JSON is needed", "Export it again.") from error


def read_file(model: type[_Model], file: Path) -> _Model:
    """Read and check one of a bundle's JSON files.

    Raises:
        BundleError: It cannot be read, or holds something else; names the first field that is wrong.
    """
    return read_part(model, read_object(file), what=file.name)


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a bundle, its fields not checked.

    Raises:
        BundleError: It cannot be read, or holds something else.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{file.name} cannot be read ({error})", "JSON is needed", "Pull or export it again."
        ) from error
    if not isinstance(content, dict):
        raise BundleError(f"{file.name} holds a {type(content).__name__}", "an object is needed", "Export it again.")
    return content


VISION, EMBED, DECODER = "onnx/vision_encoder.onnx", "onnx/embed_tokens.onnx", "onnx/decoder_model_merged.onnx"
PREFILL = "onnx/decoder_prefill_q4.onnx"
TOKENIZER, PREPROCESS, CHAT, MANIFEST = "tokenizer.json", "preprocess.json", "chat.json", "manifest.json"
REQUIRED_FILES = (VISION, EMBED, DECODER, TOKENIZER, PREPROCESS, CHAT)
"""Files of a bundle whose graphs are fp32."""

COMMON_FILES = (TOKENIZER, PREPROCESS, CHAT)
"""What every variant needs besides its graphs."""


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a bundle's ``manifest.json``.

    Raises:
        BundleError: It is missing, is of another format version, holds something else than a manifest does, lacks a
            required file, or was changed.
    """
    if not (path / MANIFEST).is_file():
        raise BundleError(
            f"{path} has no {MANIFEST}", "a bundle's folder is needed", "Check the path, or pull it again."
        )
    manifest = read_object(path / MANIFEST)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{MANIFEST} has format_version {version!r}", f"this runtime reads {FORMAT_VERSION}", "Update manyeyes."
        )
    read_part(BundleManifest, manifest, what=MANIFEST)
    files = manifest["files"]
    needed = [*COMMON_FILES, *(name for variant in read_variants(manifest).values() for name in variant_files(variant))]
    absent = [name for name in dict.fromkeys(needed) if name not in files]
    if absent:
        raise BundleError(f"{MANIFEST} lists no {', '.join(absent)}", "a whole bundle is needed", "Export it again.")
    if digest_files(files) != manifest.get("digest"):
        raise BundleError(
            f"{MANIFEST} has digest {manifest.get('digest')!r}",
            "its list of files has another one",
            "The manifest was changed: pull or export the bundle again.",
        )
    return manifest


def read_variants(manifest: Mapping[str, Any]) -> dict[str, BundleVariant]:
    """The variants of a bundle by name; an older bundle has the default alone.

    Args:
        manifest: From ``read_manifest``.

    Raises:
        BundleError: None of them is the default.
    """
    variants = {
        name: read_part(BundleVariant, given, what=name) for name, given in manifest.get("variants", {}).items()
    }
    if not variants:
        # A graph beyond 2 GiB has its weights in a second file.
        files = {graph: f"{graph}.onnx" for graph in get_args(GraphName)}
        graphs = {graph: [file, *({f"{file}.data"} & manifest["files"].keys())] for graph, file in files.items()}
        whole = {"precision": dict.fromkeys(files, "fp32"), "graphs": graphs, "parity": manifest.get("parity")}
        return {DEFAULT_VARIANT: read_part(BundleVariant, whole, what=MANIFEST)}
    if DEFAULT_VARIANT not in variants:
        raise BundleError(
            f"{MANIFEST} has the variants {', '.join(variants)}", f'one is "{DEFAULT_VARIANT}"', "Export it again."
        )
    return variants


def variant_files(variant: BundleVariant) -> list[str]:
    """The files of a variant's graphs, each once."""
    names = dict.fromkeys(name for files in variant.graphs.values() for name in files)
    return [*names, *([variant.prefill] if variant.prefill else [])]


def describe_precision(variant: BundleVariant) -> str:
    """``fp32``, or what differs from it: ``vision int8, decoder int4``."""
    below = [f"{graph} {precision}" for graph, precision in variant.precision.items() if precision != "fp32"]
    return ", ".join(below) or "fp32"


def pulled_variants(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The variants whose files are all in a bundle's folder, the default first; the default where none is whole.

    Args:
        path: The bundle's folder.
        manifest: From ``read_manifest``.
    """
    whole = [
        name
        for name, variant in read_variants(manifest).items()
        if all((path / file).is_file() for file in variant_files(variant))
    ]
    return sorted(whole, key=lambda name: name != DEFAULT_VARIANT) or [DEFAULT_VARIANT]


def choose_variant(path: Path, manifest: Mapping[str, Any], name: str | None = None) -> tuple[str, BundleVariant]:
    """The variant to load, and its name.

    Args:
        path: The bundle's folder.
        manifest: From ``read_manifest``.
        name: Which; by default ``default``, or where its files were not pulled the one whose files are all there.

    Raises:
        BundleError: There is no such variant.
    """
    variants = read_variants(manifest)
    if name is None:
        there = pulled_variants(path, manifest)
        name = there[0] if len(there) == 1 else DEFAULT_VARIANT
    if name not in variants:
        raise BundleError(
            f'variant is "{name}"',
            f"this bundle has {', '.join(variants)}",
            did_you_mean(name, variants) or "Name one.",
        )
    return name, variants[name]


def needed_files(manifest: Mapping[str, Any], variant: BundleVariant) -> dict[str, Any]:
    """What the manifest says of the files that one variant needs, and not of those of the others."""
    others = {name for other in read_variants(manifest).values() for name in variant_files(other)}
    left_out = others - set(variant_files(variant))
    return {name: file for name, file in manifest["files"].items() if name not in left_out}


def variant_digest(manifest: Mapping[str, Any], name: str) -> str:
    """Digest of one variant: the bundle's for the default, else over the files that it needs."""
    if name == DEFAULT_VARIANT:
        return str(manifest["digest"])
    return digest_files(needed_files(manifest, read_variants(manifest)[name]))


def check_files(path: Path, files: Mapping[str, Mapping[str, Any]], *, sha256: bool = True) -> None:
    """Check that files are as a manifest says.

    Args:
        path: Their folder.
        files: ``sha256`` (hexadecimal) and ``bytes`` by name.
        sha256: Whether to read the files; otherwise only their sizes are checked.

    Raises:
        BundleError: A file is missing, has another size or another sha256; names it.
    """
    for name, expected in files.items():
        try:
            _plain_name(name)
        except ValueError as problem:
            raise BundleError(f"{MANIFEST} names {name!r}", str(problem), "Do not use this bundle.") from problem
        file = path / name
        if not file.is_file():
            raise BundleError(f"{name} is missing from {path}", f"{MANIFEST} lists it", "Pull or export it again.")
        size = file.stat().st_size
        if size != expected.get("bytes"):
            raise BundleError(
                f"{name} has {size} bytes", f"{MANIFEST} says {expected.get('bytes')}", "Pull or export it again."
            )
        if not sha256:
            continue
        digest = hash_file(file)
        if digest != expected.get("sha256"):
            raise BundleError(
                f"{name} has sha256 {digest}", f"{MANIFEST} says {expected.get('sha256')}", "Pull or export it again."
            )


def digest_files(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Digest of a bundle: sha256 over the names and sha256s of its files, sorted by name.

    Args:
        files: ``sha256`` (hexadecimal) by name, as ``manifest.json`` lists them.
    """
    lines = "".join(f"{files[name].get('sha256')}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()
