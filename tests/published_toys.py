"""Small checkpoints in the layouts that published systems have, made without this project's code.

``LlavaToy`` writes LLaVA's own files and computes its logits from the formulas of its papers and code: image bytes in,
logits out. Transformers' Llama and CLIP stand in for the language model and the tower.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MptConfig,
    PreTrainedModel,
)

BICUBIC = Image.Resampling.BICUBIC
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
WIDTH, PATCH, SIZE, TOWER_WIDTH, TOWER_DEPTH = 32, 14, 56, 48, 3
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTION = "What colour is the shape?"
PROMPT = f"{SYSTEM} USER: <image>\n{QUESTION} ASSISTANT:"
TEXT = [SYSTEM, QUESTION, "USER: ASSISTANT: Human: Assistant: ###", "is there a red circle? yes no"] * 4


def photograph(width: int, height: int, *, seed: int = 0) -> bytes:
    """A PNG of smooth random colours."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def write_sentencepiece(
    folder: Path,
    *,
    added: Sequence[str] = (),
    kind: str = "bpe",
    normalization: str = "identity",
    remove_extra_whitespaces: bool = False,
) -> int:
    """Llama's own kind of tokenizer: ``tokenizer.model`` with bytes to fall back on. Returns its number of tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        vocab_size=330,
        model_type=kind,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name=normalization,
        remove_extra_whitespaces=remove_extra_whitespaces,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if added:
        (folder / "added_tokens.json").write_text(
            json.dumps({token: size + i for i, token in enumerate(added)}), encoding="utf-8"
        )
    return size + len(added)


def piece_ids(folder: Path, prompt: str, *, added: Sequence[str] = ()) -> list[int]:
    """LLaVA's ``tokenizer_image_token`` by sentencepiece itself: -200 at each image, one BOS in front."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids: list[int] = [1]
    for number, chunk in enumerate(prompt.split("<image>")):
        if number:
            ids.append(-200)
        rest = chunk
        while rest:
            starts = {token: rest.find(token) for token in added if token in rest}
            token = min(starts, key=lambda name: starts[name]) if starts else ""
            before, rest = (rest[: starts[token]], rest[starts[token] + len(token) :]) if token else (rest, "")
            ids += pieces.encode(before) if before else []
            ids += [pieces.get_piece_size() + list(added).index(token)] if token else []
    return ids


def make_clip(folder: Path | None = None, *, size: int = SIZE, seed: int = 1) -> CLIPVisionModel:
    """A small tower; with a folder it is saved there as a hub repository keeps it."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=72,
        num_hidden_layers=TOWER_DEPTH,
        num_attention_heads=3,
        patch_size=PATCH,
        image_size=size,
        initializer_range=0.3,
    )
    tower = CLIPVisionModel(config).eval()
    for parameter in tower.parameters():
        # Fresh norms and biases would hide a mistake.
        parameter.data += 0.1 * torch.randn_like(parameter)
    if folder is not None:
        tower.save_pretrained(folder)
        preprocessor = {
            "crop_size": size,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "image_mean": list(MEAN),
            "image_std": list(STD),
            "resample": 3,
            "size": size,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    return tower


def make_llama(vocab_size: int, *, seed: int = 2) -> LlamaForCausalLM:
    """A small language model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def make_language_model(family: str, vocab_size: int) -> PreTrainedModel:
    """A small Mistral or MPT."""
    torch.manual_seed(2)
    if family == "mistral":
        sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 8}
        config: Any = MistralConfig(
            vocab_size=vocab_size, hidden_size=WIDTH, intermediate_size=56, initializer_range=0.2, **sizes
        )
    else:
        config = MptConfig(vocab_size=vocab_size, d_model=WIDTH, n_heads=4, n_layers=2, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config).eval()


def tower_keys(tower: CLIPVisionModel, prefix: str) -> dict[str, Tensor]:
    """The tower's tensors as transformers 4 names them, under a prefix."""
    state = {key.removeprefix("vision_model."): tensor for key, tensor in tower.state_dict().items()}
    return {f"{prefix}vision_model.{key}": tensor.clone() for key, tensor in state.items()}


def pixels_of(data: bytes, *, size: int, aspect: str) -> Tensor:
    """CLIP's preprocessing by Pillow and numpy: ``[1, 3, size, size]``."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = picture.size
    if aspect == "pad" and width != height:
        longest = max(width, height)
        square = Image.new("RGB", (longest, longest), (122, 116, 104))
        square.paste(picture, ((longest - width) // 2, (longest - height) // 2))
        picture = square
    width, height = picture.size
    short = min(width, height)
    picture = picture.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return normalised(picture.crop((left, top, left + size, top + size)))


def normalised(picture: Image.Image) -> Tensor:
    """``[1, 3, H, W]`` with CLIP's mean and deviation."""
    values = (np.asarray(picture, np.float64) / 255 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None].contiguous()


def decoded(data: bytes) -> Image.Image:
    """The picture."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def on_black(picture: Image.Image, width: int, height: int) -> Image.Image:
    """In the middle of a black canvas."""
    canvas = Image.new("RGB", (width, height))
    canvas.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return canvas


class LlavaToy:
    """A LLaVA: files and formulas.

    Args:
        folder: Where its tokenizer lies.
        projector: ``mm_projector_type``.
        added: Tokens behind sentencepiece's own.
        spare_rows: Rows of the embedding table that no token has.
    """

    def __init__(
        self, folder: Path, *, projector: str = "mlp2x_gelu", added: Sequence[str] = (), spare_rows: int = 0
    ) -> None:
        self.added = tuple(added)
        self.folder = folder
        self.vocab_size = write_sentencepiece(folder, added=added) + spare_rows
        self.language_model: PreTrainedModel = make_llama(self.vocab_size)
        self.tower = make_clip()
        self.kind = projector
        torch.manual_seed(3)
        self.projector = {
            "mm_projector.weight": 0.3 * torch.randn(WIDTH, TOWER_WIDTH),
            "mm_projector.bias": torch.randn(WIDTH),
        }
        if projector == "mlp2x_gelu":
            self.projector = {
                "mm_projector.0.weight": 0.3 * torch.randn(WIDTH, TOWER_WIDTH),
                "mm_projector.0.bias": torch.randn(WIDTH),
                "mm_projector.2.weight": 0.3 * torch.randn(WIDTH, WIDTH),
                "mm_projector.2.bias": torch.randn(WIDTH),
            }

    def config(self, **changes: Any) -> dict[str, Any]:
        """``config.json`` as LLaVA 1.5 writes it."""
        language = self.language_model.config
        return {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "hidden_act": "silu",
            "hidden_size": language.hidden_size,
            "image_aspect_ratio": "pad",
            "image_grid_pinpoints": None,
            "freeze_mm_mlp_adapter": False,
            "intermediate_size": language.intermediate_size,
            "max_position_embeddings": 1024,
            "mm_hidden_size": TOWER_WIDTH,
            "mm_projector_type": self.kind,
            "mm_resampler_type": None,
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "tokenizer_model_max_length": 2048,
            "tokenizer_padding_side": "right",
            "torch_dtype": "float32",
            "transformers_version": "4.31.0",
            "tune_mm_mlp_adapter": False,
            "unfreeze_mm_vision_tower": False,
            "use_cache": True,
            "use_mm_proj": True,
            "vocab_size": self.vocab_size,
            **changes,
        }

    def tensors(self, *, tower: bool = False) -> dict[str, Tensor]:
        """All tensors under LLaVA's keys, with the frequencies that old shards carry."""
        tensors = {key: tensor.clone() for key, tensor in self.language_model.state_dict().items()}
        tensors |= {f"model.{key}": tensor.clone() for key, tensor in self.projector.items()}
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        if tower:
            tensors |= tower_keys(self.tower, "model.vision_tower.vision_tower.")
        return tensors

    def write(self, *, shards: int = 1, form: str = "safetensors", tower: bool = False, **changes: Any) -> Path:
        """Write config and weights beside the tokenizer."""
        (self.folder / "config.json").write_text(json.dumps(self.config(**changes)), encoding="utf-8")
        write_weights(self.folder, self.tensors(tower=tower), shards=shards, form=form)
        return self.folder

    def project(self, features: Tensor) -> Tensor:
        """The projector."""
        if self.kind == "linear":
            return functional.linear(
                features, self.projector["mm_projector.weight"], self.projector["mm_projector.bias"]
            )
        hidden = functional.linear(
            features, self.projector["mm_projector.0.weight"], self.projector["mm_projector.0.bias"]
        )
        hidden = functional.gelu(hidden)
        return functional.linear(hidden, self.projector["mm_projector.2.weight"], self.projector["mm_projector.2.bias"])

    @torch.no_grad()
    def image_tokens(self, pixels: Tensor, *, layer: int = -2) -> Tensor:
        """``[1, 3, S, S]`` to ``[N, WIDTH]``: hidden states of the chosen layer, without the class token, projected."""
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states
        return self.project(hidden[layer][:, 1:])[0]

    @torch.no_grad()
    def logits(self, ids: Sequence[int], images: Sequence[Tensor]) -> Tensor:
        """``[T, V]`` of ids in which -200 stands for one of ``images``, ``[N, WIDTH]`` each."""
        table, given, rows = self.language_model.get_input_embeddings(), iter(images), []
        for token in ids:
            rows.append(next(given) if token == -200 else table(torch.tensor([token])))
        logits: Tensor = self.language_model(inputs_embeds=torch.cat(rows)[None]).logits[0]
        return logits


def write_weights(folder: Path, tensors: Mapping[str, Tensor], *, shards: int, form: str) -> None:
    """One file or shards with an index, as safetensors or pickles."""
    stem, suffix = ("model", ".safetensors") if form == "safetensors" else ("pytorch_model", ".bin")
    names = [f"{stem}-{i + 1:05}-of-{shards:05}{suffix}" for i in range(shards)] if shards > 1 else [stem + suffix]
    parts: list[dict[str, Tensor]] = [{} for _ in names]
    for number, (key, tensor) in enumerate(tensors.items()):
        parts[number * len(names) // len(tensors)][key] = tensor.contiguous()
    for name, part in zip(names, parts, strict=True):
        if form == "safetensors":
            save_file(part, folder / name)
        else:
            torch.save(part, folder / name)
    if shards > 1:
        index = {
            "metadata": {},
            "weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part},
        }
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_language_model(toy: LlavaToy) -> Path:
    """The language model alone, as its own repository keeps it, beside the tokenizer."""
    config = {**toy.language_model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    (toy.folder / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    write_weights(toy.folder, toy.language_model.state_dict(), shards=2, form="bin")
    return toy.folder


def llava_beside_clip(folder: Path) -> LlavaToy:
    """A LLaVA in ``llava`` whose tower lies in ``clip``."""
    toy = LlavaToy(folder / "llava")
    toy.tower = make_clip(folder / "clip")
    return toy
