"""A small checkpoint of transformers' LLaVA, made on the spot: what ours and its peers run.

A CLIP tower, a Llama and a tokenizer, all small and all of the published shapes' kind, with random weights from a fixed
seed. It knows nothing; what is compared is whether everybody writes the same, and how fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics  # half a megabyte of English, in every Python

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
VOCABULARY = 8192
_SEED = 20
# Random weights almost never end an answer: the end's row of the head is this much longer, so that some stop early.
_EAGER_TO_STOP = 2.0


@dataclass(frozen=True)
class PeerModel:
    """Sizes of the checkpoint.

    Attributes:
        image_size: Side of the picture that the encoder takes, in pixels: 224 or 336, as CLIP has them.
        encoder_width: Width of CLIP's blocks.
        encoder_depth: How many; the last one is not looked at, as in LLaVA.
        width: Width of the language model.
        depth: Its layers.
        heads: Its heads; keys and values have as many.
        patch: Side of the encoder's patches, in pixels.
        vocabulary: Rows of its embeddings and its head; the tokenizer has the first ``VOCABULARY``.
    """

    image_size: int = 224
    encoder_width: int = 384
    encoder_depth: int = 6
    width: int = 512
    depth: int = 8
    heads: int = 8
    patch: int = 14
    vocabulary: int = VOCABULARY


def write_peer_model(folder: Path, model: PeerModel) -> int:
    """Write the checkpoint as the hub has LLaVA's (``llava-hf/...``).

    Args:
        folder: Where.
        model: Its sizes.

    Returns:
        How many parameters it has.
    """
    tokenizer = _train_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=model.encoder_width,
            intermediate_size=4 * model.encoder_width,
            num_hidden_layers=model.encoder_depth,
            num_attention_heads=model.encoder_width // 64,
            image_size=model.image_size,
            patch_size=model.patch,
        ),
        text_config=LlamaConfig(
            vocab_size=model.vocabulary,
            hidden_size=model.width,
            intermediate_size=round(model.width * 8 / 3 / 64) * 64,
            num_hidden_layers=model.depth,
            num_attention_heads=model.heads,
            num_key_value_heads=model.heads,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        ),
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(model.image_size // model.patch) ** 2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        network = LlavaForConditionalGeneration(config).eval()
        _spread(network)
    network.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": model.image_size},
            crop_size={"height": model.image_size, "width": model.image_size},
        ),
        tokenizer=tokenizer,
        patch_size=model.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return sum(parameter.numel() for parameter in network.parameters())


def _spread(network: LlavaForConditionalGeneration) -> None:
    # Transformers' own start, 0.02 everywhere, gives a model that repeats one token whatever it sees. With the variance
    # kept from layer to layer, what it writes depends on picture and question, and its likeliest tokens lie apart.
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel() if "embed" not in name else 1
                parameter.normal_(0, 1.5 / fan_in**0.5)
        network.lm_head.weight[2] *= _EAGER_TO_STOP


def _train_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=4096,
    )
