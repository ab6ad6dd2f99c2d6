"""From a checkpoint to a bundle: its graphs and its JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from tokenizers import Tokenizer

from manyeyes.estimate.skeleton import count_model
from manyeyes.export.graphs import check_exportable, export_decoder, export_embed, export_vision
from manyeyes.export.parity import ParityReport
from manyeyes.model import ManyEyesForConditionalGeneration, checkpoint_digest, load_checkpoint
from manyeyes.recipe import Recipe
from manyeyes.runtime.bundle_contents import (
    CHAT,
    DECODER,
    EMBED,
    MANIFEST,
    PREPROCESS,
    TOKENIZER,
    VISION,
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


def export_bundle(checkpoint: Path, out: Path, *, recipe: Recipe, data_md5: str, code_digest: str) -> BundleManifest:
    """Write a checkpoint as an ONNX bundle.

    The same checkpoint gives the same bytes with the same versions of torch, onnxscript and onnx-ir.

    Args:
        checkpoint: From ``manyeyes.model.save_checkpoint``.
        out: The bundle's folder; it appears when it is complete and replaces an older one.
        recipe: Opset and precision come from it, and its digest is stamped on the bundle.
        data_md5: md5 of the data snapshot.
        code_digest: Digest of the library.

    Returns:
        What ``manifest.json`` says. Its ``parity`` is null until ``record_parity``.

    Raises:
        CheckpointError: The checkpoint is missing or incomplete.
        BundleError: The model cannot be exported.
        StorageError: No space or no permission to write.
    """
    model, processor = load_checkpoint(checkpoint)
    model = model.eval().float()
    opset = recipe.export.opset
    transforms = processor.image_transforms
    sizes = {name: transform.size for name, transform in transforms.items()}
    check_exportable(model, processor)
    preprocess = PreprocessFile(
        mode="independent" if model.shared_pixels is None else "shared",
        shared=_describe_shared(model),
        encoders={
            name: read_part(EncoderPixels, transform.as_dict(), what=f"pixels of {name}")
            for name, transform in transforms.items()
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
        graphs = {
            VISION: export_vision(model, sizes, folder / VISION, opset=opset),
            EMBED: export_embed(model.language_model, folder / EMBED, opset=opset),
            DECODER: export_decoder(model.language_model, folder / DECODER, opset=opset, reinjection=model.reinjection),
        }
        _save_tokenizer(processor.rust_tokenizer, folder / TOKENIZER)
        write_json(preprocess, folder / PREPROCESS)
        write_json(chat, folder / CHAT)
        files = {file.name: _describe_file(file) for file in sorted(folder.iterdir())}
        manifest = BundleManifest(
            recipe=recipe.name,
            recipe_digest=recipe.digest,
            data_md5=data_md5,
            code_digest=code_digest,
            checkpoint_digest=checkpoint_digest(checkpoint),
            opset=opset,
            precision=recipe.export.precision,
            files=files,
            graphs=graphs,
            model=count_model(model.config),
            digest=digest_files({name: file.model_dump() for name, file in files.items()}),
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
    summary = BundleParity(
        items=report.items,
        token_match=report.token_match,
        max_abs_logit=report.max_abs_logit,
        mean_abs_logit=report.mean_abs_logit,
    )
    manifest = load_manifest(bundle).model_copy(update={"parity": summary})
    write_json(manifest, bundle / MANIFEST)
    return manifest


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
