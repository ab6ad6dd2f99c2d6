"""Answers with pictures: tags, a small random Stable Diffusion, the command line."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import manyeyes.runtime.bundle
from manyeyes.drawing import (
    DrawingWarning,
    draw,
    find_prompts,
    load_pipeline,
    request_drawing,
    save_images,
)
from manyeyes.errors import DrawingError
from tests.cli_calls import call

FEW_STEPS = {"num_inference_steps": 2, "height": 16, "width": 16}


# --- tags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text", "prompts"),
    [
        ("a plain answer", "a plain answer", ()),
        ("Here it is. <h> a red cat </h>", "Here it is.", ("a red cat",)),
        ("<h>one</h> and <h>\ntwo\n</h> done", "and done", ("one", "two")),
        ("use <h1> or 1 < 2", "use <h1> or 1 < 2", ()),
        ("", "", ()),
    ],
)
def test_prompts_are_taken_out_of_the_text(answer: str, text: str, prompts: tuple[str, ...]) -> None:
    found = find_prompts(answer)
    assert (found.text, found.prompts, found.problems) == (text, prompts, ())


@pytest.mark.parametrize(
    ("answer", "text", "prompts", "problem"),
    [
        ("ok <h> a cat", "ok <h> a cat", (), "<h> at character 3 of the answer has no </h>; was the answer cut off?"),
        ("a cat </h> ok", "a cat </h> ok", (), "</h> at character 6 of the answer has no <h> before it"),
        ("<h> a <h> b </h>", "<h> a", ("b",), "<h> at character 0 of the answer has no </h>"),
        ("<h>a</h></h> b", "</h> b", ("a",), "</h> at character 8 of the answer has no <h> before it"),
        ("x <h> </h> y", "x <h> </h> y", (), "nothing stands between <h> and </h> at character 2 of the answer"),
    ],
)
def test_tags_that_do_not_pair_stay_text(answer: str, text: str, prompts: tuple[str, ...], problem: str) -> None:
    found = find_prompts(answer)
    assert (found.text, found.prompts, found.problems) == (text, prompts, (problem,))


def test_a_question_asks_for_a_picture_once() -> None:
    assert request_drawing("Draw a cat. \n") == "Draw a cat. <GEN>"
    assert request_drawing("Draw a cat. <GEN>") == "Draw a cat. <GEN>"


# --- a pipeline of diffusers ---------------------------------------------------------------------------------------


def small_tokenizer() -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[], model_max_length=24)


def small_pipeline() -> StableDiffusionPipeline:
    """Random weights; 16x16 pixels in a few milliseconds."""
    torch.manual_seed(0)
    tokenizer = small_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        attention_head_dim=4,
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return small_pipeline()


def pixels(image: Image.Image) -> Any:
    return np.asarray(image)


def test_each_prompt_is_drawn_and_a_seed_gives_the_picture_again(pipeline: StableDiffusionPipeline) -> None:
    answer = "Two cats. <h> a red cat </h> <h> a blue cat </h>"
    drawn = draw(answer, pipeline, seed=5, settings=FEW_STEPS)
    assert (drawn.text, drawn.prompts, drawn.seeds) == ("Two cats.", ("a red cat", "a blue cat"), (5, 6))
    first, second = drawn.images
    assert first.size == (16, 16)
    assert (pixels(first) != pixels(second)).any()
    again = draw(answer, pipeline, seed=5, settings=FEW_STEPS)
    np.testing.assert_array_equal(pixels(again.images[1]), pixels(second))
    alone = draw("<h> a blue cat </h>", pipeline, seed=6, settings=FEW_STEPS)
    np.testing.assert_array_equal(pixels(alone.images[0]), pixels(second))
    other = draw("<h> a blue cat </h>", pipeline, seed=7, settings=FEW_STEPS)
    assert (pixels(other.images[0]) != pixels(second)).any()


def test_the_prompt_reaches_the_pipeline(pipeline: StableDiffusionPipeline) -> None:
    one, other = (
        draw(f"<h>{prompt}</h>", pipeline, settings={**FEW_STEPS, "guidance_scale": 30.0}).images[0]
        for prompt in ("a red cat", "zzzz 9")
    )
    assert (pixels(one) != pixels(other)).any()


def test_nothing_is_drawn_without_tags() -> None:
    def refuses(prompt: str) -> None:
        raise AssertionError(prompt)

    assert draw("just text", refuses).images == ()


def test_bad_tags_warn_and_the_rest_is_drawn(pipeline: StableDiffusionPipeline) -> None:
    with pytest.warns(DrawingWarning, match="has no </h>; was the answer cut off"):
        drawn = draw("<h> a cat </h> and <h> a dog", pipeline, settings=FEW_STEPS)
    assert (drawn.text, len(drawn.images)) == ("and <h> a dog", 1)


def test_a_withheld_picture_warns() -> None:
    def censors(prompt: str, generator: torch.Generator) -> SimpleNamespace:
        return SimpleNamespace(images=[Image.new("RGB", (4, 4))], nsfw_content_detected=[True])

    with pytest.warns(DrawingWarning, match="withheld image 0"):
        assert len(draw("<h>x</h>", censors).images) == 1


@pytest.mark.parametrize(
    ("settings", "found", "do"),
    [
        ({"num_inference_step": 3}, 'setting is "num_inference_step"', 'Did you mean "num_inference_steps"?'),
        ({"generator": 1}, 'setting is "generator"', "Leave it out."),
    ],
)
def test_a_wrong_setting_is_refused(
    pipeline: StableDiffusionPipeline, settings: dict[str, object], found: str, do: str
) -> None:
    with pytest.raises(DrawingError) as caught:
        draw("<h>x</h>", pipeline, settings=settings)
    assert caught.value.found == found
    assert do in caught.value.do


def test_a_size_that_the_pipeline_refuses_is_said(pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises(DrawingError, match="divisible by 8"):
        draw("<h>x</h>", pipeline, settings={**FEW_STEPS, "height": 15})


def test_a_pipeline_that_does_not_draw_text_is_refused() -> None:
    unconditional = DDPMPipeline(
        UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            norm_num_groups=4,
            layers_per_block=1,
        ),
        DDIMScheduler(),
    )
    with pytest.raises(DrawingError, match="pipeline DDPMPipeline takes batch_size"):
        draw("<h>x</h>", unconditional)


# --- loading -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pipeline: StableDiffusionPipeline) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(path)
    return path


def test_a_saved_pipeline_draws_the_same(folder: Path, pipeline: StableDiffusionPipeline) -> None:
    answer = "<h> a red cat </h>"
    loaded = draw(answer, load_pipeline(str(folder), device="cpu"), settings=FEW_STEPS)
    expected = draw(answer, pipeline, settings=FEW_STEPS)
    np.testing.assert_array_equal(pixels(loaded.images[0]), pixels(expected.images[0]))


def test_a_folder_without_a_pipeline_says_so(tmp_path: Path) -> None:
    with pytest.raises(DrawingError, match=r"has no model_index\.json"):
        load_pipeline(str(tmp_path))


def test_pickled_weights_are_refused_unread(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    pipeline.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    weights = tmp_path / "unet" / "diffusion_pytorch_model.bin"
    weights.write_bytes(b"not read")
    with pytest.raises(DrawingError, match="cannot be loaded") as caught:
        load_pipeline(str(tmp_path), device="cpu")
    assert "safetensors" in caught.value.needed


def test_missing_diffusers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name))
    with pytest.raises(DrawingError) as caught:
        load_pipeline("anything")
    assert caught.value.do == "Install it: pip install 'manyeyes[drawing]'"


def test_files_carry_prompt_and_seed(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    drawn = draw("<h> a café é </h> <h>two</h>", pipeline, seed=3, settings=FEW_STEPS)
    paths = save_images(drawn, tmp_path / "out")
    assert sorted((tmp_path / "out").iterdir()) == sorted(paths)
    with Image.open(paths[0]) as image:
        assert (image.text["prompt"], image.text["seed"]) == ("a café é", "3")
        np.testing.assert_array_equal(pixels(image), pixels(drawn.images[0]))
    assert save_images(drawn, tmp_path / "out") == paths
    assert len(list((tmp_path / "out").iterdir())) == 2


# --- manyeyes ask --draw -------------------------------------------------------------------------------------------


@dataclass
class Asked:
    """What a stand-in for a bundle was asked, and what it says."""

    answer_text: str = "A cat. <h> a red cat </h>"
    question: str = ""
    images: int = -1
    max_new_tokens: int = 0

    def answer(self, question: str, *, images: list[bytes], max_new_tokens: int) -> str:
        self.question, self.images, self.max_new_tokens = question, len(images), max_new_tokens
        return self.answer_text


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asked:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "manifest.json").write_text("{}", encoding="utf-8")
    (tmp_path / "a.png").write_bytes(b"an image")
    monkeypatch.chdir(tmp_path)
    stand_in = Asked()
    monkeypatch.setattr(manyeyes.runtime.bundle, "load_bundle", lambda _path, **_options: stand_in)
    return stand_in


def test_ask_draws_into_the_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: Asked, folder: Path, tmp_path: Path
) -> None:
    settings = [word for name, value in FEW_STEPS.items() for word in ("--draw-set", f"{name}={value}")]
    assert (
        call(
            monkeypatch,
            "ask",
            "model",
            "-",
            "Draw a cat",
            "--draw",
            str(folder),
            "--out",
            "out",
            "--seed",
            "4",
            *settings,
        )
        == 0
    )
    assert (asked.question, asked.images, asked.max_new_tokens) == ("Draw a cat <GEN>", 0, 512)
    text, path = capsys.readouterr().out.splitlines()
    assert text == "A cat."
    with Image.open(tmp_path / path) as image:
        assert (image.size, image.text["seed"]) == ((16, 16), "4")


def test_ask_says_that_there_is_nothing_to_draw(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: Asked, folder: Path
) -> None:
    asked.answer_text = "A cat. <h> a red"
    with warnings.catch_warnings(record=True) as caught:
        assert call(monkeypatch, "ask", "model", "a.png", "Draw it", "--draw", str(folder)) == 0
    assert not [warning for warning in caught if issubclass(warning.category, DrawingWarning)]
    output = capsys.readouterr()
    assert output.out == "A cat. <h> a red\n"
    assert "warning: <h> at character 7" in output.err
    assert "asks for no picture" in output.err
    assert asked.images == 1


def test_ask_without_draw_is_a_plain_question(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: Asked
) -> None:
    assert call(monkeypatch, "ask", "model", "a.png", "What is it?") == 0
    assert (asked.question, asked.images, asked.max_new_tokens) == ("What is it?", 1, 32)
    assert capsys.readouterr().out == asked.answer_text + "\n"


def test_ask_refuses_a_pipeline_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: Asked, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert call(monkeypatch, "ask", "model", "-", "Draw a cat", "--draw", "empty") == 2
    assert 'drawing pipeline "empty" cannot be loaded' in capsys.readouterr().err
    assert asked.question == ""
