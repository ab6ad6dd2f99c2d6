"""The JSON files of a bundle.

``manyeyes.runtime`` reads them without pydantic; these models write them and say what they hold.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manyeyes.errors import BundleError
from manyeyes.export.model_facts import ModelFacts
from manyeyes.runtime.bundle_files import MANIFEST

FORMAT_VERSION: Literal[1] = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BundleFile(_Strict):
    """One file of a bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="sha256 of the file, hexadecimal.")
    bytes: int = Field(ge=0, description="Size in bytes.")


class GraphTensor(_Strict):
    """One input or output of a graph."""

    name: str = Field(description="Its name in the graph.")
    dtype: str = Field(description="Element type as numpy names it: float32, int64.")
    shape: list[int | str] = Field(description="Sizes; a dynamic axis has a name instead.")


class GraphSignature(_Strict):
    """What a graph takes and gives."""

    inputs: list[GraphTensor] = Field(description="Inputs, in the graph's order.")
    outputs: list[GraphTensor] = Field(description="Outputs, in the graph's order.")


class ParitySummary(_Strict):
    """How closely the bundle follows torch; parity.json has the rest."""

    items: int = Field(ge=0, description="Questions compared.")
    token_match: float = Field(ge=0, le=1, description="Share of questions whose whole token sequence is equal.")
    max_abs_logit: float = Field(ge=0, description="Largest absolute difference of a first-token logit.")
    mean_abs_logit: float = Field(ge=0, description="Mean absolute difference of first-token logits.")


class BundleManifest(_Strict):
    """``manifest.json``: what a bundle is, where it comes from, and the checksum of every file."""

    format_version: Literal[1] = Field(default=FORMAT_VERSION, description="Version of this layout.")
    recipe: str = Field(description="Name of the recipe.")
    recipe_digest: str = Field(description="sha256 of the recipe, hexadecimal.")
    data_md5: str = Field(description="md5 of the data snapshot, 32 hexadecimal digits.")
    code_digest: str = Field(description="Digest of the library that trained and exported.")
    checkpoint_digest: str = Field(description="sha256 over the checkpoint's files, hexadecimal.")
    opset: int = Field(ge=18, description="ONNX operator set.")
    precision: Literal["fp32"] = Field(description="Precision of the weights.")
    files: dict[str, BundleFile] = Field(description="Every file but this one, by name.")
    graphs: dict[str, GraphSignature] = Field(description="Inputs and outputs of each graph, by file name.")
    digest: str = Field(description="Digest of the bundle: sha256 over the names and sha256s of its files.")
    model: ModelFacts | None = Field(default=None, description="Size and cost of the model; null in older bundles.")
    parity: ParitySummary | None = Field(default=None, description="Comparison with torch; null until it is measured.")


class EncoderPixels(_Strict):
    """How one encoder wants its pixels."""

    size: int = Field(gt=0, description="Side of the square input, in pixels.")
    mean: tuple[float, float, float] = Field(description="Mean of each RGB channel, on a scale of 0 to 1.")
    std: tuple[float, float, float] = Field(description="Standard deviation of each RGB channel, scale of 0 to 1.")
    resample: Literal["bicubic", "bilinear"] = Field(description="Resizing filter, antialiased.")
    fit: Literal["stretch", "crop", "pad"] = Field(description="What happens to an image that is not square.")
    fill: tuple[int, int, int] | None = Field(
        default=None, description="Colour around a padded image, RGB, 0 to 255; null for the mean colour."
    )


class ImageLayout(_Strict):
    """How an image becomes tiles, and its visual tokens a sequence."""

    tiling: Literal["none", "anyres", "grid"] = Field(
        description="none: one tile. anyres: the image as a whole, then the tiles of the grid among pinpoints that "
        "suits it best. grid: the image as a whole, then image_grid x image_grid tiles."
    )
    pinpoints: list[tuple[int, int]] = Field(description="For anyres: columns and rows of the grids to choose from.")
    image_grid: int = Field(ge=1, description="For grid: tiles a side.")
    newline: bool = Field(description="Whether a learned token ends each row of visual tokens.")
    newline_at: Literal["rows", "end"] = Field(
        description="rows: as newline says. end: one such token after the image's last token instead."
    )
    unpad: bool = Field(description="Whether rows and columns that show nothing but padding are left out.")
    whole: list[str] = Field(description="Encoders that see the whole image once, whatever the tiling.")
    tile_size: int = Field(gt=0, description="Side of a tile of the first tiled encoder, in pixels.")


class SharedInput(_Strict):
    """How the vision graph makes each encoder's input from its one input: bilinear interpolation, in fp32."""

    align_corners: bool = Field(description="Whether corner pixels keep the place of their centres.")
    antialias: bool = Field(description="Whether the filter is widened when shrinking.")
    encoder_sizes: dict[str, int] = Field(description="Side of each encoder's input in pixels, by its name.")


class PreprocessFile(_Strict):
    """``preprocess.json``: from image files to the vision graph's inputs."""

    mode: Literal["independent", "shared"] = Field(
        description="independent: each encoder's input is resized from the uint8 image. shared: the graph takes one "
        "input, named shared, and makes each encoder's from it."
    )
    encoders: dict[str, EncoderPixels] = Field(description="By the name of the graph's input.")
    shared: SharedInput | None = Field(default=None, description="Inside the graph, with mode shared; else null.")
    layout: ImageLayout | None = Field(
        default=None, description="Tiles and the order of their tokens; null for one tile, its tokens as they are."
    )


class ChatFile(_Strict):
    """``chat.json``: from a question to tokens."""

    template: dict[str, str | bool] = Field(description="The text around turns; fields of ChatTemplate.")
    system: str | None = Field(description="Replaces the template's system text; null keeps it.")
    image_token_id: int = Field(ge=0, description="Stands at visual tokens; never looked up in the embedding table.")
    image_tokens: int = Field(gt=0, description="Visual tokens an image; with a layout, a tile.")
    max_length: int = Field(gt=0, description="Most tokens, question, image and answer together.")
    stop_token_ids: list[int] = Field(description="Token ids that end an answer.")


def load_manifest(bundle: Path) -> BundleManifest:
    """Read and check a bundle's ``manifest.json``.

    Raises:
        BundleError: Missing, or not a manifest.
    """
    file = bundle / MANIFEST
    try:
        return BundleManifest.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(
            f"{file} cannot be read ({error})", "a bundle's folder is needed", "Check the path."
        ) from error
    except ValidationError as error:
        raise BundleError(f"{file} is no manifest ({error})", "a bundle's manifest", "Export it again.") from error


def write_json(model: BaseModel, file: Path) -> None:
    """Write a model as indented JSON, whole or not at all; the same model gives the same bytes.

    Args:
        model: Any pydantic model.
        file: Where; its folder exists.
    """
    content: dict[str, Any] = model.model_dump(mode="json")
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
