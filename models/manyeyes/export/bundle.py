"""From a checkpoint to a bundle: its graphs and its JSON files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from tokenizers import Tokenizer

from manyeyes.estimate.skeleton import count_model
from manyeyes.export.graphs import check_exportable, name_pixels
from manyeyes.export.parity import ParityFigures, ParityReport
from manyeyes.export.transformers_js import ours_alone, write_settings
from manyeyes.export.variants import write_graphs
from manyeyes.model import ManyEyesForConditionalGeneration, checkpoint_digest, load_checkpoint
from manyeyes.recipe import Recipe
from manyeyes.runtime.bundle import Group
from manyeyes.runtime.bundle_contents import (
    CHAT,
    DEFAULT_VARIANT,
    MANIFEST,
    PREPROCESS,
    TOKENIZER,
    BundleFile,
    BundleManifest,
    BundleParity,
    ChatFile,
    EncoderPixels,
    ImageLayout,
    PreprocessFile,
    SharedInput,
    TemplateText,
    digest_files,
    read_file,
    read_part,
)
from manyeyes.runtime.vision import PIXELS
from manyeyes.storage import hash_file, new_folder, write_file


def load_manifest(bundle: Path) -> BundleManifest:
    """Read and check a bundle's ``manifest.json``.

    Raises:
        BundleError: Missing, or not a manifest.
    """
    return read_file(BundleManifest, bundle / MANIFEST)


def write_json(model: BaseModel, file: Path) -> None:
    """Write a model as indented JSON, whole or not at all; the same model gives the same bytes.

    Args:
        model: Any pydantic model.
        file: Where; its folder exists.
    """
    content: dict[str, Any] = model.model_dump(mode="json")
    write_file(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def export_bundle(
    checkpoint: Path,
    out: Path,
    *,
    recipe: Recipe,
    data_md5: str,
    code_digest: str,
    calibration: Sequence[Group] = (),
) -> BundleManifest:
    """Write a checkpoint as an ONNX bundle.

    The same checkpoint gives the same bytes with the same versions of torch, onnxscript and onnx-ir.

    Args:
        checkpoint: From ``manyeyes.model.save_checkpoint``.
        out: The bundle's folder; it appears when it is complete and replaces an older one.
        recipe: Opset, precision and variants come from it, and its digest is stamped on the bundle.
        data_md5: md5 of the data snapshot.
        code_digest: Digest of the library.
        calibration: Questions about images, on which fp16 is tried where the recipe asks for it.

    Returns:
        What ``manifest.json`` says. Its ``parity`` is null until ``record_parity``.

    Raises:
        CheckpointError: The checkpoint is missing or incomplete.
        BundleError: The model cannot be exported, or not in fp16.
        StorageError: No space or no permission to write.
    """
    model, processor = load_checkpoint(checkpoint)
    model = model.eval().float()
    transforms = processor.image_transforms
    check_exportable(model, processor)
    preprocess = PreprocessFile(
        mode="independent" if model.shared_pixels is None else "shared",
        shared=_describe_shared(model),
        encoders={
            name: read_part(EncoderPixels, transform.as_dict(), what=f"pixels of {name}")
            for name, transform in zip(name_pixels(model, transforms), transforms.values(), strict=True)
        },
        layout=None if processor.layout is None else read_part(ImageLayout, processor.layout, what="layout"),
    )
    chat = ChatFile(
        template=read_part(TemplateText, processor.conversation_template.as_dict(), what="chat template"),
        system=processor.system,
        image_token_id=processor.image_token_id,
        image_tokens=processor.num_image_tokens,
        max_length=processor.max_length,
        stop_token_ids=processor.stop_token_ids,
    )
    with new_folder(out) as folder:
        graphs, variants = write_graphs(
            model,
            processor,
            folder,
            precisions=recipe.export.precisions(),
            opset=recipe.export.opset,
            calibration=calibration,
        )
        _save_tokenizer(processor.rust_tokenizer, folder / TOKENIZER)
        write_json(preprocess, folder / PREPROCESS)
        write_json(chat, folder / CHAT)
        unknown = ours_alone(model, processor, chat)
        if not unknown:
            pixels = preprocess.encoders[PIXELS]
            write_settings(model, processor, folder, chat=chat, pixels=pixels, variants=variants)
        files = {
            file.relative_to(folder).as_posix(): _describe_file(file)
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        main = variants[DEFAULT_VARIANT].precision
        manifest = BundleManifest(
            recipe=recipe.name,
            recipe_digest=recipe.digest,
            data_md5=data_md5,
            code_digest=code_digest,
            checkpoint_digest=checkpoint_digest(checkpoint),
            opset=recipe.export.opset,
            precision="fp32" if set(main.values()) == {"fp32"} else main,
            files=files,
            graphs=graphs,
            model=count_model(model.config),
            digest=digest_files({name: file.model_dump() for name, file in files.items()}),
            variants=variants,
            ours_alone=unknown,
        )
        write_json(manifest, folder / MANIFEST)
    return manifest


def record_parity(bundle: Path, report: ParityReport) -> BundleManifest:
    """Write a parity report's summary into a bundle's manifest. The bundle's digest stays as it is.

    Args:
        bundle: The bundle's folder.
        report: From ``measure_parity``.

    Raises:
        BundleError: No bundle there.
    """
    manifest = load_manifest(bundle)
    measured = {DEFAULT_VARIANT: report, **report.variants}
    variants = {
        name: variant.model_copy(update={"parity": _summary(measured[name]) if name in measured else None})
        for name, variant in manifest.variants.items()
    }
    manifest = manifest.model_copy(update={"parity": _summary(report), "variants": variants})
    write_json(manifest, bundle / MANIFEST)
    return manifest


def _summary(figures: ParityFigures) -> BundleParity:
    return BundleParity(
        items=figures.items,
        token_match=figures.token_match,
        max_abs_logit=figures.max_abs_logit,
        mean_abs_logit=figures.mean_abs_logit,
    )


def _describe_shared(model: ManyEyesForConditionalGeneration) -> SharedInput | None:
    shared = model.shared_pixels
    if shared is None:
        return None
    return SharedInput(
        align_corners=shared.align_corners, antialias=shared.antialias, encoder_sizes=model.encoder_sizes
    )


def _save_tokenizer(tokenizer: Tokenizer, file: Path) -> None:
    # A published tokenizer.json may cut or pad every text; the runtime does its own padding and never cuts.
    own = Tokenizer.from_str(tokenizer.to_str())
    own.no_truncation()
    own.no_padding()
    own.save(str(file))


def _describe_file(file: Path) -> BundleFile:
    return BundleFile(sha256=hash_file(file), bytes=file.stat().st_size)
