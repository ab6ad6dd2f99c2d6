"""Files by which transformers.js opens a bundle that is shaped like LLaVA.

It knows one encoder, a projector and a language model, one tile an image, and nothing that looks back at the image from
inside. Such a bundle's graphs are ones that ``LlavaForConditionalGeneration`` runs, under its names; here are the
settings beside them. Whatever else a recipe may ask for, ``ours_alone`` names.

Source:
    ``@huggingface/transformers`` 4.3: ``models/llava``, ``models/modeling_utils.js``, ``configs.js``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyeyes.chat import question_with_images
from manyeyes.export.graphs import own_structure
from manyeyes.model import ManyEyesForConditionalGeneration, ManyEyesProcessor
from manyeyes.runtime.bundle_contents import DEFAULT_VARIANT, BundleVariant, ChatFile, EncoderPixels, GraphName
from manyeyes.runtime.chat import asked_template, encode_conversation, leading_ids

# Language models whose cache transformers.js names by ``num_hidden_layers``.
_LANGUAGE_MODELS = (
    "gemma",
    "gemma2",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
_FILTERS = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
_DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "int8", "int4": "q4"}
_SESSIONS: dict[GraphName, str] = {
    "vision": "vision_encoder",
    "embed": "embed_tokens",
    "decoder": "decoder_model_merged",
}
_QUESTIONS = ("What is shown?", "  é🙂 and\nhow many? ")


def ours_alone(model: ManyEyesForConditionalGeneration, processor: ManyEyesProcessor, chat: ChatFile) -> list[str]:
    """What of a bundle transformers.js does not know; empty where it opens it.

    Args:
        model: Of the bundle.
        processor: The model's.
        chat: What ``chat.json`` says.
    """
    reasons = own_structure(model)
    kind = model.config.text_config.model_type
    if kind not in _LANGUAGE_MODELS:
        reasons.append(f"a language model of the kind {kind}")
    token = processor.rust_tokenizer.id_to_token(chat.image_token_id)
    if token is None or processor.rust_tokenizer.encode(token, add_special_tokens=False).ids != [chat.image_token_id]:
        reasons.append("an image token that the tokenizer does not read as one")
    elif not reasons and not _reads_alike(processor, chat, token):
        reasons.append("a prompt whose tokens are others when it is read as one text")
    return reasons


def write_settings(
    model: ManyEyesForConditionalGeneration,
    processor: ManyEyesProcessor,
    folder: Path,
    *,
    chat: ChatFile,
    pixels: EncoderPixels,
    variants: Mapping[str, BundleVariant],
) -> None:
    """Write what transformers.js reads beside graphs and tokenizer.

    Args:
        model: One of which ``ours_alone`` says nothing.
        processor: The model's.
        folder: The bundle's.
        chat: What ``chat.json`` says.
        pixels: How the encoder wants its pixels.
        variants: Of the bundle; the default's precisions are those that are opened unless others are asked for.
    """
    tokenizer = processor.rust_tokenizer
    text_config = json.loads(model.config.text_config.to_json_string(use_diff=False))
    shards = {Path(files[0]).name: len(files) - 1 for each in variants.values() for files in each.graphs.values()}
    precision = variants[DEFAULT_VARIANT].precision
    template = write_template(processor, chat)
    # What stands for images is no padding.
    padding = next(iter(chat.stop_token_ids))
    settings: dict[str, Any] = {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_id": chat.image_token_id,
            "image_token_index": chat.image_token_id,
            "text_config": {key: value for key, value in text_config.items() if key != "_name_or_path"},
            "transformers.js_config": {
                "dtype": {_SESSIONS[graph]: _DTYPES[each] for graph, each in precision.items()},
                "use_external_data_format": {name: count for name, count in shards.items() if count},
            },
        },
        "generation_config.json": {
            "do_sample": False,
            "eos_token_id": chat.stop_token_ids,
            "max_length": chat.max_length,
            "pad_token_id": padding,
        },
        "preprocessor_config.json": {"processor_class": "LlavaProcessor", **_describe_pixels(pixels)},
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": tokenizer.id_to_token(chat.image_token_id),
            "vision_feature_select_strategy": "full",
            **_describe_count(pixels.size, chat.image_tokens),
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": processor.tokenizer.bos_token,
            "eos_token": tokenizer.id_to_token(padding),
            "pad_token": tokenizer.id_to_token(padding),
            "chat_template": template,
            "clean_up_tokenization_spaces": False,
            "model_max_length": chat.max_length,
            "padding_side": "left",
        },
    }
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


# Behind the fields of a ``ChatTemplate``, a variable each. White space outside of values is left out.
_TEMPLATE = """
{%- macro plain(content) -%}
{%- if content is string -%} {{- content -}}
{%- else -%} {%- for part in content if part["type"] == "text" -%} {{- part["text"] -}} {%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro opening() -%}
{%- set text = system | trim if trims else system -%}
{%- if text -%} {{- system_prefix + text + system_suffix -}} {%- endif -%}
{%- endmacro -%}
{%- set turns = messages -%}
{%- if messages[0]["role"] == "system" -%}
{%- set system = plain(messages[0]["content"]) -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
{%- if system and not takes_system -%}
{{- raise_exception("The template of this model has no place for a system text.") -}}
{%- endif -%}
{{- start -}}
{%- if not system_inside -%} {{- opening() -}} {%- endif -%}
{%- for turn in turns -%}
{%- if turn["role"] == "assistant" -%}
{%- set text = plain(turn["content"]) -%}
{{- gpt_lead + (text | trim if trims else text) + gpt_end + gpt_after -}}
{%- else -%}
{{- ("" if loop.first else between) + human_prefix -}}
{%- if loop.first and system_inside -%} {{- opening() -}} {%- endif -%}
{%- set seen = namespace(text="") -%}
{%- if turn["content"] is not string -%}
{%- for part in turn["content"] if part["type"] == "image" -%} {%- set seen.text = seen.text + image -%} {%- endfor -%}
{%- endif -%}
{%- set text = seen.text if images_only else seen.text + plain(turn["content"]) -%}
{{- (text | trim if trims else text) + human_suffix -}}
{%- if add_generation_prompt or not loop.last -%} {{- gpt_prefix -}} {%- endif -%}
{%- endif -%}
{%- endfor -%}
"""
_TEXTS = ("system_prefix", "system_suffix", "human_prefix", "human_suffix", "gpt_prefix", "gpt_lead", "gpt_end")
_CHOICES = ("gpt_after", "between", "images_only", "system_inside", "takes_system", "trims")


def write_template(processor: ManyEyesProcessor, chat: ChatFile) -> str:
    """The text around turns as a Jinja template that asks for an answer; images stand in front of their question.

    Args:
        processor: Its tokenizer puts a token in front of a text by itself; the template leaves that one out.
        chat: What ``chat.json`` says.
    """
    template, tokenizer = asked_template(processor.conversation_template), processor.rust_tokenizer
    leading = "".join(str(tokenizer.id_to_token(token)) for token in leading_ids(tokenizer))
    image = template.image_prefix + str(tokenizer.id_to_token(chat.image_token_id)) + template.image_suffix
    fields = {
        "system": template.system if chat.system is None else chat.system,
        "start": template.start if template.adds_bos else template.start.removeprefix(leading),
        "image": image if template.images_only else f"{image}\n",
        **{name: getattr(template, name) for name in (*_TEXTS, *_CHOICES)},
    }
    set_up = (f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}" for name, value in fields.items())
    return "\n".join(set_up) + _TEMPLATE.rstrip()


def _reads_alike(processor: ManyEyesProcessor, chat: ChatFile, token: str) -> bool:
    """Whether a prompt has the same tokens for us, who read the text around images part by part, and as one text."""
    template = write_template(processor, chat)
    tokenizer = processor.rust_tokenizer
    for question in _QUESTIONS:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        shown = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
        )
        whole = tokenizer.encode(str(shown).replace(token, token * chat.image_tokens), add_special_tokens=True)
        ours = encode_conversation(
            tokenizer,
            processor.conversation_template,
            [("human", question_with_images(question, num_images=1))],
            image_tokens=[chat.image_tokens],
            image_token_id=chat.image_token_id,
            system=chat.system,
            generation_prompt=True,
        )
        if whole.ids != ours.input_ids:
            return False
    return True


def _describe_pixels(pixels: EncoderPixels) -> dict[str, Any]:
    side = {"height": pixels.size, "width": pixels.size}
    described: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": side,
        "resample": _FILTERS[pixels.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }
    if pixels.fit == "crop":
        described |= {"size": {"shortest_edge": pixels.size}, "do_center_crop": True, "crop_size": side}
    elif pixels.fit == "pad":
        # The one that centres. It pads normalised pixels, and scales the colour it is given and nothing more.
        fill = pixels.fill or [255 * mean for mean in pixels.mean]
        colour = [
            255 * (value / 255 - mean) / std for value, mean, std in zip(fill, pixels.mean, pixels.std, strict=True)
        ]
        described |= {
            "image_processor_type": "VLMImageProcessor",
            "size": {"longest_edge": pixels.size},
            "image_size": pixels.size,
            "do_pad": True,
            "background_color": colour,
        }
    return described


def _describe_count(size: int, tokens: int) -> dict[str, int]:
    """How many tokens an image of this size has: patches, and what comes on top of them."""
    side = math.isqrt(tokens)
    if side * side == tokens and size // (size // side) == side:
        return {"patch_size": size // side, "num_additional_image_tokens": 0}
    return {"patch_size": size, "num_additional_image_tokens": tokens - 1}
