"""What every converter shares: tokenizers, memory, messages about bad input, the command line, transformers' port."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from manyeyes.checkpoints import llava
from manyeyes.checkpoints.convert import configure, convert
from manyeyes.checkpoints.encoder_sources import EncoderSources
from manyeyes.checkpoints.logits import prompt_logits
from manyeyes.checkpoints.source import OriginalCheckpoint, StoredTensor
from manyeyes.checkpoints.to_llava import write_llava
from manyeyes.checkpoints.tokenizer_files import build_sentencepiece, load_published_tokenizer, parse_sentencepiece
from manyeyes.cli.main import cli
from manyeyes.errors import CheckpointError, ManyEyesError, RecipeError, SourceError
from manyeyes.model import write_manifest
from manyeyes.modeling import ManyEyesForConditionalGeneration
from tests import published_toys as toys
from tests.model_toys import write_tokenizer
from tests.published_toys import PROMPT, QUESTION, LlavaToy

PICTURE = toys.photograph(90, 61)


@pytest.fixture
def toy(tmp_path: Path) -> LlavaToy:
    toy = LlavaToy(tmp_path / "llava")
    toy.tower = toys.make_clip(tmp_path / "clip")
    return toy


def _convert(tmp_path: Path, **options: Any) -> Path:
    convert(tmp_path / "llava", tmp_path / "out", **{"encoders": str(tmp_path / "clip"), **options})
    return tmp_path / "out"


def _refusal(tmp_path: Path, kind: type[ManyEyesError] = CheckpointError, **options: Any) -> str:
    before = {entry.name for entry in tmp_path.iterdir()}
    with pytest.raises(kind) as caught:
        _convert(tmp_path, **options)
    assert {entry.name for entry in tmp_path.iterdir()} == before, "something half-written is left"
    return str(caught.value)


# --- bad input -----------------------------------------------------------------------------------------------------


def test_missing_key_is_named_as_published(tmp_path: Path, toy: LlavaToy) -> None:
    tensors = toy.tensors()
    del tensors["model.mm_projector.2.bias"]
    toy.write()
    toys.write_weights(toy.folder, tensors, shards=1, form="safetensors")
    message = _refusal(tmp_path)
    assert 'missing "model.mm_projector.2.bias" (for projector.layers.linear_2.bias [32])' in message


def test_extra_key_is_named(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    tensors = toy.tensors() | {"model.mm_projector.4.weight": torch.zeros(2, 3)}
    toys.write_weights(toy.folder, tensors, shards=1, form="safetensors")
    assert 'left over "model.mm_projector.4.weight" [2, 3]' in _refusal(tmp_path)


def test_misshapen_key_is_named_on_both_sides(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    tensors = toy.tensors() | {"model.mm_projector.0.weight": torch.zeros(32, 47)}
    toys.write_weights(toy.folder, tensors, shards=1, form="safetensors")
    message = _refusal(tmp_path)
    assert 'misshapen "model.mm_projector.0.weight" [32, 47], for projector.layers.linear_1.weight [32, 48]' in message


def test_misshapen_part_of_a_joined_tensor_is_named(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write(tower=True, unfreeze_mm_vision_tower=True)
    key = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight"
    tensors = toy.tensors(tower=True) | {key: torch.zeros(48, 47)}
    toys.write_weights(toy.folder, tensors, shards=1, form="safetensors")
    message = _refusal(tmp_path)
    assert f'"{key}" [48, 47]' in message
    assert "which do not give encoders.clip.net.blocks.0.attn.qkv.weight [144, 48]" in message


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_truncated_shard_is_named(tmp_path: Path, toy: LlavaToy, form: str) -> None:
    toy.write(shards=2, form=form)
    name = "model-00002-of-00002.safetensors" if form == "safetensors" else "pytorch_model-00002-of-00002.bin"
    whole = (toy.folder / name).read_bytes()
    (toy.folder / name).write_bytes(whole[: len(whole) // 2])
    message = _refusal(tmp_path)
    assert f"{name} cannot be read" in message
    assert "a whole file of tensors. Fetch it again." in message


def test_index_that_names_an_absent_file_is_refused(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write(shards=2)
    (toy.folder / "model-00001-of-00002.safetensors").unlink()
    assert "model.safetensors.index.json names model-00001-of-00002.safetensors, not in" in _refusal(tmp_path)


def test_index_that_promises_other_keys_is_refused(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write(shards=2)
    index = toy.folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.image_newline"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(values))
    assert 'promises "model.image_newline" in model-00001-of-00002.safetensors (1 keys)' in _refusal(tmp_path)


class _Bomb:
    def __init__(self, action: Callable[[str], object], argument: str) -> None:
        self._made = (action, (argument,))

    def __reduce__(self) -> Any:
        return self._made


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_with_code_is_refused_unread(tmp_path: Path, toy: LlavaToy, zipped: bool) -> None:
    toy.write()
    (toy.folder / "model.safetensors").unlink()
    harmed = tmp_path / "harmed"
    torch.save(
        {"model.norm.weight": _Bomb(os.mkdir, str(harmed))},
        toy.folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    message = _refusal(tmp_path)
    assert "pytorch_model.bin is a pickle with code in it" in message
    assert "nothing of it was run" in message
    assert not harmed.exists()


def test_unknown_system_lists_those_known(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write(model_type="blip-2", architectures=["Blip2ForConditionalGeneration"])
    message = _refusal(tmp_path)
    assert "model_type 'blip-2'" in message
    assert "llava (model_type llava, llava_llama, llava_mistral or llava_mpt, and one mm_vision_tower)" in message
    assert "llava-hf (" in message


def test_absent_encoder_says_what_to_pass(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    message = _refusal(tmp_path, SourceError, encoders=None)
    assert 'encoder "clip" is "openai/clip-vit-large-patch14-336", which is neither in the checkpoint' in message
    assert "--encoders DIR" in message
    assert "hub:<id>@<revision>" in message


def test_encoder_folder_that_is_not_there_is_refused(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    assert "a folder, hub:<id>@<revision>, or hub" in _refusal(tmp_path, SourceError, encoders=str(tmp_path / "no"))


def test_encoder_without_its_tensors_leaves_nothing_behind(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    save_file({key: t for key, t in weights.items() if "pre_layrnorm" not in key}, tmp_path / "clip/model.safetensors")
    assert "missing norm_pre.bias, norm_pre.weight (2)" in _refusal(tmp_path, SourceError)


def test_tower_of_unknown_heads_asks_for_its_configuration(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write(tower=True, unfreeze_mm_vision_tower=True)
    message = _refusal(tmp_path, encoders=None)
    assert 'encoder "clip" has hidden_size 48' in message
    assert "its number of heads, which no tensor tells" in message
    assert '--encoder-config FILE.json with {"clip": {"num_attention_heads"' in message


def test_configuration_of_an_encoder_that_is_not_there_is_refused(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    (tmp_path / "configs.json").write_text(json.dumps({"clop": {}}))
    message = _refusal(tmp_path, encoder_configs=tmp_path / "configs.json")
    assert '--encoder-config has "clop"' in message
    assert 'Did you mean "clip"?' in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch'"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type 'qformer'"),
        ({"s2": True}, "s2 True"),
        ({"mm_patch_merge_type": "spatial_maxpool2x2"}, "mm_patch_merge_type 'spatial_maxpool2x2'"),
        ({"mm_projector_type": "mlp_swiglu"}, 'mm_projector_type "mlp_swiglu"'),
        ({"mm_vision_select_layer": -9}, "mm_vision_select_layer is -9"),
        ({"image_aspect_ratio": "anyres"}, 'image_aspect_ratio "anyres" and mm_patch_merge_type "flat"'),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(
    tmp_path: Path, toy: LlavaToy, changes: dict[str, Any], words: str
) -> None:
    toy.write(**changes)
    assert words in _refusal(tmp_path)


def test_adapter_without_its_base_says_what_to_pass(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    (toy.folder / "model.safetensors").unlink()
    settings = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}
    (toy.folder / "adapter_config.json").write_text(json.dumps(settings))
    message = _refusal(tmp_path)
    assert 'is a LoRA adapter of "lmsys/vicuna-7b-v1.5", which is not here' in message
    assert "--base FOLDER" in message


def test_broken_configuration_is_named(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    (toy.folder / "config.json").write_text('{"model_type": ')
    assert "config.json is broken" in _refusal(tmp_path)


def test_unknown_template_names_the_nearest(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    assert 'Did you mean "vicuna_v1"?' in _refusal(tmp_path, RecipeError, template="vicuna_v2")


def test_folder_of_something_else_is_not_replaced(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("words")
    assert "exists and is no checkpoint of ManyEyes" in _refusal(tmp_path)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "words"


def test_preprocessing_of_another_size_is_refused(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    file = tmp_path / "clip" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"crop_size": {"height": 42, "width": 42}}))
    assert "has crop_size {'height': 42, 'width': 42} in preprocessor_config.json" in _refusal(tmp_path)


# --- sizes ---------------------------------------------------------------------------------------------------------


def test_published_size_of_llava_1_5_needs_nothing_but_its_own_files(tmp_path: Path) -> None:
    # As tensors of the published 7B with its tower: names and shapes alone.
    config = LlamaConfig(rms_norm_eps=1e-5, max_position_embeddings=4096)
    with torch.device("meta"):
        language_model, tower = LlamaForCausalLM(config), CLIPVisionModel(_openai_clip())
    shapes = {key: tuple(tensor.shape) for key, tensor in language_model.state_dict().items()}
    shapes |= {key: tuple(t.shape) for key, t in toys.tower_keys(tower, "model.vision_tower.vision_tower.").items()}
    for layer, width in ((0, 1024), (2, 4096)):
        shapes |= {f"model.mm_projector.{layer}.weight": (4096, width), f"model.mm_projector.{layer}.bias": (4096,)}
    stored = {key: StoredTensor(tmp_path, key, shape, torch.float16) for key, shape in shapes.items()}
    fields = {
        "model_type": "llava",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
        "unfreeze_mm_vision_tower": True,
        **{key: getattr(config, key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers")},
        **{key: getattr(config, key) for key in ("num_attention_heads", "rms_norm_eps", "max_position_embeddings")},
    }
    checkpoint = OriginalCheckpoint(tmp_path, fields, stored)
    plan = llava.SYSTEM.plan(checkpoint, EncoderSources(None, {}, tmp_path))
    assert plan.encoders[0].architecture == {}
    assert plan.encoders[0].image_size == 336
    assert plan.fusion["grid"] == 24
    with torch.device("meta"):
        model = ManyEyesForConditionalGeneration(configure(plan, image_token_id=0))
    ours = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    resolution = plan.keys.resolve(ours, shapes, name="llava-v1.5-7b")
    assert set(resolution.assignments) == set(ours)
    assert all(key.startswith("model.vision_tower.") for key in resolution.left)
    # 6.738 B of Vicuna, 20.98 M of the projector, 290.9 M of CLIP without its last block and norm.
    assert sum(math.prod(shape) for shape in ours.values()) == 6_738_415_616 + 20_979_712 + 290_909_184


def _openai_clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        image_size=336,
    )


# --- tokenizers ----------------------------------------------------------------------------------------------------


TEXTS = [
    PROMPT.replace("<image>", ""),
    "  two  spaces ",
    "na\u00efve \ufb01 \u4f60\u597d \U0001f642\n\ttab  x",
    "USER: USER:",
    " ",
    "",
    "\n",
    "a\u2581b",
]


@pytest.mark.parametrize(
    ("kind", "normalization", "remove"),
    [("bpe", "identity", False), ("bpe", "identity", True), ("unigram", "nmt_nfkc", True), ("bpe", "nmt_nfkc", True)],
)
def test_sentencepiece_ids_are_sentencepieces_own(tmp_path: Path, kind: str, normalization: str, remove: bool) -> None:
    toys.write_sentencepiece(tmp_path, kind=kind, normalization=normalization, remove_extra_whitespaces=remove)
    parsed = parse_sentencepiece((tmp_path / "tokenizer.model").read_bytes(), name="tokenizer.model")
    tokenizer = build_sentencepiece(parsed, legacy=True)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False).ids == pieces.encode(text), text


def test_newer_llama_rule_puts_a_space_in_front_of_the_first_text_alone(tmp_path: Path) -> None:
    toys.write_sentencepiece(tmp_path)
    parsed = parse_sentencepiece((tmp_path / "tokenizer.model").read_bytes(), name="tokenizer.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    first = pieces.encode("\nred circle")
    # Behind a byte of its own no space is put: two tokens, then the bare text.
    second = pieces.encode("\nis there")[2:]
    found = build_sentencepiece(parsed, legacy=False).encode("\nred circle</s>is there", add_special_tokens=False).ids
    assert found == [*first, 2, *second]


def test_tokenizer_json_is_taken_as_it_is(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    text = "what colour</s>is the shape?"
    expected = AutoTokenizer.from_pretrained(tmp_path)(text).input_ids
    assert expected[0] == 1
    assert load_published_tokenizer(tmp_path, model_type="llama")(text).input_ids == expected


def test_llama_settings_decide_about_the_beginning_of_sequence(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}
    file.write_text(json.dumps(settings))
    tokenizer = load_published_tokenizer(tmp_path, model_type="llama")
    assert tokenizer("what").input_ids == tokenizer("what", add_special_tokens=False).input_ids


def test_truncated_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    toys.write_sentencepiece(tmp_path)
    data = (tmp_path / "tokenizer.model").read_bytes()
    with pytest.raises(CheckpointError, match="it ends in the middle of a field"):
        parse_sentencepiece(data[:-3], name="tokenizer.model")


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    size = toys.write_sentencepiece(tmp_path, added=("<im_start>", "<im_end>"))
    tokenizer = load_published_tokenizer(tmp_path, model_type="llama")
    assert tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"]) == [size - 2, size - 1]
    assert tokenizer("<im_start>red").input_ids == [
        1,
        *toys.piece_ids(tmp_path, "<im_start>red", added=("<im_start>",))[1:],
    ]


# --- memory --------------------------------------------------------------------------------------------------------


class _Watch:
    """The most memory of its own that this process holds meanwhile; pages of mapped files do not count."""

    def __enter__(self) -> _Watch:
        self._start = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.peak - self._start

    def _look(self) -> None:
        while not self._stop.wait(0.0005):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc to see memory in use")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_memory_stays_below_twice_the_largest_shard(tmp_path: Path, toy: LlavaToy, form: str) -> None:
    layers, hidden = 16, 20_000
    block = {key: t for key, t in toy.tensors().items() if ".layers.0." in key}
    for name in ("gate_proj", "up_proj"):
        block[f"model.layers.0.mlp.{name}.weight"] = torch.rand(hidden, toys.WIDTH)
    block["model.layers.0.mlp.down_proj.weight"] = torch.rand(toys.WIDTH, hidden)
    tensors = {key: t for key, t in toy.tensors().items() if ".layers." not in key}
    for layer in range(layers):
        tensors |= {key.replace(".0.", f".{layer}.", 1): t for key, t in block.items()}
    toy.write(num_hidden_layers=layers, intermediate_size=hidden)
    (toy.folder / "model.safetensors").unlink()
    toys.write_weights(toy.folder, {key: t.clone() for key, t in tensors.items()}, shards=8, form=form)
    del tensors, block
    sizes = [file.stat().st_size for file in toy.folder.glob("*-of-*")]
    with _Watch() as watch:
        _convert(tmp_path)
    assert sum(sizes) > 5 * max(sizes)
    assert watch.growth < 2 * max(sizes), f"{watch.growth / 1e6:.1f} MB for shards of {max(sizes) / 1e6:.1f} MB"


# --- transformers' port, and back ----------------------------------------------------------------------------------


def _port(tmp_path: Path, toy: LlavaToy) -> LlavaForConditionalGeneration:
    # A row for the image's token, behind the tokenizer's own.
    toy.language_model.config.vocab_size = toy.vocab_size + 1
    config = LlavaConfig(
        vision_config=toy.tower.config,
        text_config=toy.language_model.config,
        image_token_index=toy.vocab_size,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(8)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "llava")
    return model


@pytest.mark.parametrize("keys", ["saved", "nested"])
def test_port_of_transformers_gives_the_ports_logits(tmp_path: Path, toy: LlavaToy, keys: str) -> None:
    model = _port(tmp_path, toy)
    if keys == "nested":
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        save_file(state, tmp_path / "llava" / "model.safetensors")
    report = convert(tmp_path / "llava", tmp_path / "out")
    assert report.system == "llava-hf"
    ids, count = toys.piece_ids(toy.folder, PROMPT), (toys.SIZE // toys.PATCH) ** 2
    place = ids.index(-200)
    ids[place : place + 1] = [toy.vocab_size] * count
    pixels = toys.pixels_of(PICTURE, size=toys.SIZE, aspect="square")
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0].numpy()
    found = prompt_logits(tmp_path / "out", prompt=QUESTION, images=[PICTURE])
    np.testing.assert_allclose(found.logits, expected, atol=1e-4, rtol=0)


def test_written_as_llava_and_read_again_nothing_changes(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    out = _convert(tmp_path)
    done = CliRunner().invoke(cli, ["convert", "--to", "llava", str(out), str(tmp_path / "back")])
    assert done.exit_code == 0, done.output
    written = load_file(tmp_path / "back" / "model.safetensors")
    for key, tensor in toy.tensors().items():
        if "inv_freq" not in key:
            torch.testing.assert_close(written[key], tensor, rtol=0, atol=0)
    report = convert(tmp_path / "back", tmp_path / "again")
    assert report.encoders == {"clip": str(tmp_path / "back" / "vision_tower")}
    first, second = (prompt_logits(path, prompt=QUESTION, images=[PICTURE]) for path in (out, tmp_path / "again"))
    np.testing.assert_array_equal(first.logits, second.logits)


def test_what_llava_has_no_place_for_is_not_written(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    out = _convert(tmp_path)
    config = json.loads((out / "config.json").read_text())
    config["fusion"]["grid"] = 3
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json changed since it was written"):
        write_llava(out, tmp_path / "back")
    (out / "checkpoint.json").unlink()
    write_manifest(out)
    with pytest.raises(CheckpointError, match="the fusion channel-concat on a grid of 3"):
        write_llava(out, tmp_path / "back")
    assert not (tmp_path / "back").exists()


# --- command line --------------------------------------------------------------------------------------------------


def test_command_line_converts_and_gives_logits(tmp_path: Path, toy: LlavaToy) -> None:
    toy.write()
    (tmp_path / "picture.png").write_bytes(PICTURE)
    run = CliRunner().invoke
    done = run(cli, ["convert", str(toy.folder), str(tmp_path / "out"), "--encoders", str(tmp_path / "clip")])
    assert done.exit_code == 0, done.output
    assert "llava: " in done.output
    assert "template vicuna_v1" in done.output
    arguments = ["logits", str(tmp_path / "out"), "--image", str(tmp_path / "picture.png"), "--prompt", QUESTION]
    done = run(cli, [*arguments, "--out", str(tmp_path / "logits.npy")])
    assert done.exit_code == 0, done.output
    saved = np.load(tmp_path / "logits.npy")
    expected = prompt_logits(tmp_path / "out", prompt=QUESTION, images=[PICTURE])
    np.testing.assert_array_equal(saved, expected.logits)
    lines = done.output.splitlines()
    assert lines[-1].startswith(str(list(saved.shape)))
    assert len(lines) == len(saved) + 1
    assert sum("image ->" in line for line in lines) == (toys.SIZE // toys.PATCH) ** 2
