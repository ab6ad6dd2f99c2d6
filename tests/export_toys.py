"""Toy models whose answers depend on every image and question, and bundles of them."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from manyeyes.encoders import encoder_transform
from manyeyes.export.bundle import export_bundle
from manyeyes.model import (
    ManyEyesConfig,
    ManyEyesForConditionalGeneration,
    ManyEyesProcessor,
    save_checkpoint,
)
from manyeyes.processor import SHARED
from manyeyes.recipe import Recipe
from manyeyes.runtime.bundle import Group
from manyeyes.runtime.bundle_contents import DECODER, MANIFEST, BundleManifest, digest_files
from manyeyes.runtime.tiling import TokenLayout
from manyeyes.storage import hash_file

MD5 = "0" * 32
VOCABULARY = 280
ENCODERS = {"vit": "vit-tiny-p16-64", "efficientnet": "efficientnet-lite0"}
CONCAT = {"strategy": "channel-concat", "grid": 2}


@dataclass(frozen=True)
class Toy:
    """A checkpoint and its bundle."""

    checkpoint: Path
    bundle: Path
    manifest: BundleManifest


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, of 280 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["USER: what colour is the circle? ASSISTANT: red yes no"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_model(
    *,
    encoders: Mapping[str, str] = ENCODERS,
    fusion: Mapping[str, Any] = CONCAT,
    sides: Mapping[str, int] | None = None,
    layout: TokenLayout | None = None,
    reinjection: Mapping[str, Any] | None = None,
    shared: Mapping[str, Any] | None = None,
    max_length: int = 96,
    text: Mapping[str, Any] | None = None,
) -> tuple[ManyEyesForConditionalGeneration, ManyEyesProcessor]:
    """A model with random weights; ``sides`` are those of the encoders' inputs, 64 pixels when left out.

    With ``shared`` (``ManyEyesConfig.shared_pixels``) every encoder's input is made from one tensor; ``text`` replaces
    fields of the language model's configuration.
    """
    torch.manual_seed(5)
    sides = sides or dict.fromkeys(encoders, 64)
    language_model: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max(128, max_length),
        # Wide weights make answers depend on every question and image.
        "initializer_range": 0.3,
    }
    config = ManyEyesConfig(
        text_config=LlamaConfig(**language_model | dict(text or {})),
        encoders=[
            {"name": name, "encoder": row, "image_size": sides[name], "small": True} for name, row in encoders.items()
        ],
        fusion=dict(fusion),
        projector={"kind": "mlp", "depth": 2},
        reinjection=None if reinjection is None else dict(reinjection),
        layout=None if layout is None else layout.as_dict(),
        shared_pixels=None if shared is None else dict(shared),
        image_token_id=0,
    )
    model = ManyEyesForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.mul_(4)
        if model.reinjection is not None:
            # As drawn, the blocks would add next to nothing.
            for sampler in model.reinjection.samplers:
                sampler.mlp[2].weight.mul_(8)
        for parameter in model.parameters():
            # No two tensors alike: the exporter writes equal ones, such as fresh norms, only once.
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
        # Some answers are to end before the limit.
        model.get_output_embeddings().weight[2] *= 4
    transforms = {name: encoder_transform(row, image_size=sides[name]).as_dict() for name, row in encoders.items()}
    if shared is not None:
        transforms = {SHARED: {**next(iter(transforms.values())), "size": shared["image_size"]}}
        if layout is not None and layout.tiling == "grid":
            layout = replace(layout, whole=(SHARED,))
    processor = ManyEyesProcessor(
        make_tokenizer(),
        transforms=transforms,
        template="vicuna_v1",
        system="",
        num_image_tokens=model.num_image_tokens,
        image_token_id=0,
        max_length=max_length,
        layout=None if layout is None else layout.as_dict(),
        sends_image_sizes=model.fusion.uses_image_sizes,
    )
    return model, processor


def make_toy(folder: Path, recipe: Recipe, *, calibration: Sequence[Group] = (), **changes: Any) -> Toy:
    """Write a checkpoint and export it; ``changes`` as for ``make_model``."""
    save_checkpoint(*make_model(**changes), folder / "checkpoint")
    manifest = export_bundle(
        folder / "checkpoint",
        folder / "bundle",
        recipe=recipe,
        data_md5=MD5,
        code_digest="c" * 64,
        calibration=calibration,
    )
    return Toy(folder / "checkpoint", folder / "bundle", manifest)


def change_decoder(bundle: Path, out: Path) -> Path:
    """The same bundle with other weights in its decoder, as more training leaves it; its answers are others."""
    shutil.copytree(bundle, out)
    graph = onnx.load(out / DECODER)
    (norm,) = [tensor for tensor in graph.graph.initializer if tensor.name.endswith("model.norm.weight")]
    norm.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(norm), norm.name))
    onnx.save(graph, out / DECODER)
    manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"][DECODER] |= {"sha256": hash_file(out / DECODER), "bytes": (out / DECODER).stat().st_size}
    manifest["digest"] = digest_files(manifest["files"])
    (out / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return out


def picture(seed: int, width: int = 64, height: int = 64) -> bytes:
    """A PNG of 16 coloured fields."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def make_groups() -> list[Group]:
    """Groups of every kind: several questions, several images, an image twice, none, and none with questions.

    Images are wide, high and square, so that a layout gives them different numbers of tokens.
    """
    questions = ("what colour is the circle?", "red?", "is it yes or no, and what colour is it, please?", "é🙂")
    groups = [Group((picture(seed, 64, 40 + 8 * seed),), questions[: 1 + seed % 4]) for seed in range(6)]
    groups.append(Group((picture(0, 150, 50), picture(1, 50, 150)), ("which of the two is red?", "both?")))
    groups.append(Group((picture(3),), ("asked again of the same image?",)))
    groups.append(Group((), ("no image at all?", "and what now?")))
    groups.append(Group((picture(9),), ()))
    return groups


def count_written(graph: Path) -> int:
    """Numbers that an ONNX file holds."""
    return sum(int(np.prod(tensor.dims)) for tensor in onnx.load(graph).graph.initializer)


def rewrite_manifest(bundle: Path) -> None:
    """Make checksums true again after a change."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    for name in manifest["files"]:
        content = (bundle / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest["digest"] = digest_files(manifest["files"])
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
