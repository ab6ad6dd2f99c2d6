"""A toy language model with a byte-level tokenizer, and recipes on it; seconds to build, no network."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.configuration_utils import PreTrainedConfig

from manyeyes.recipe import ModelSpec

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>"]
TEXT = "what colour is the shape? is there a red circle? yes no USER: ASSISTANT:"
# What the configuration of a language model of any kind takes.
ANY_MODEL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def toy_config(vocab_size: int, **changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(vocab_size=vocab_size, **{**sizes, **changes})


def write_tokenizer(folder: Path) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return len(fast)


def write_language_model(folder: Path, config: PreTrainedConfig | None = None) -> Path:
    """Tokenizer and random weights of a Llama, or of ``config``, in the hub's layout."""
    vocab_size = write_tokenizer(folder)
    if config is None:
        config = toy_config(vocab_size)
    # transformers' tokenizer of Qwen2 adds <|endoftext|> to any vocabulary.
    config.vocab_size = vocab_size + (config.model_type == "qwen2")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def toy_spec(folder: Path, /, **changes: Any) -> ModelSpec:
    """Two encoders from scratch, joined by their channels."""
    values: dict[str, Any] = {
        "encoders": [
            {"name": "vit", "encoder": "vit-tiny-p16-64"},
            {"name": "efficientnet", "encoder": "efficientnet-lite0", "image_size": 64},
        ],
        "fusion": {"strategy": "channel-concat", "grid": 4},
        "language_model": {"source": f"dir:{folder}", "max_length": 256},
        "chat": {"template": "vicuna_v1", "system": ""},
    }
    return ModelSpec.model_validate({**values, **changes})


def toy_images(count: int, *, seed: int = 0) -> list[NDArray[np.uint8]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(count)]


def png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
