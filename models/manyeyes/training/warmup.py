"""Pretrained parts for small recipes: a language model warmed up on text, an encoder on masked images.

A frozen language model teaches an encoder something only if it already knows the words, which answers a question
allows, and how to answer from what stands in front of the question. ``pretrain_language_model`` gives it those from
text alone; ``pretrain_encoder`` gives an encoder features without any label. Both take minutes on two CPU cores.
"""

from __future__ import annotations

import ast
import json
import math
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from manyeyes.data.records import Record
from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import Snapshot
from manyeyes.encoders import build_encoder, encoder_transform
from manyeyes.errors import RecordError
from manyeyes.runtime.chat import CHAT_TEMPLATES, encode_conversation
from manyeyes.runtime.preprocess import decode_image, transform_image
from manyeyes.storage import new_folder

BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
MAX_CONTEXT_TOKENS = 16


@dataclass(frozen=True)
class LanguageModelPlan:
    """Size and training of the small language model; the defaults give about one million parameters."""

    vocabulary: int = 1536
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    feed_forward: int = 352
    max_positions: int = 1024
    steps: int = 800
    turn_rows: int = 128
    text_rows: int = 12
    text_tokens: int = 96
    learning_rate: float = 3e-3
    other_weight: float = 0.3


@dataclass(frozen=True)
class MaskedImagePlan:
    """Training of an encoder on masked patches."""

    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 1e-3
    mask_ratio: float = 0.5
    visible_weight: float = 0.1


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    supervised: list[bool]


def pretrain_language_model(
    out: Path,
    *,
    snapshot: Snapshot,
    seed: int,
    dataset: str = "easy-vqa-train",
    template: str = "vicuna_v1",
    plan: LanguageModelPlan | None = None,
) -> float:
    """Train a small Llama and its tokenizer on a data set's text and on the standard library's documentation.

    Three kinds of rows: a question alone (what the answers are, and how often); a question behind text about the same
    image, where the image tokens will stand later (how to answer from context); English prose (docstrings and the
    help topics of ``pydoc``). No image is looked at.

    Args:
        out: Folder to write: ``config.json``, ``model.safetensors`` (bfloat16), tokenizer files.
        snapshot: Where the data set lives.
        seed: Of weights, order and context.
        dataset: Training data set; validation and test sets must not be named here.
        template: Row of ``CHAT_TEMPLATES`` that the turns are written in.
        plan: Size and training.

    Returns:
        Mean loss at the answers over the last twentieth of the steps, in nats a token.

    Raises:
        SnapshotError: No such data set.
    """
    plan = plan or LanguageModelPlan()
    rng = random.Random(seed)
    torch.manual_seed(seed)
    conversations = [_pairs(record) for record in _read(snapshot, dataset)]
    prose = list(standard_library_prose())
    tokenizer = train_tokenizer(
        [text for pairs in conversations for pair in pairs for text in pair] + prose, vocabulary=plan.vocabulary
    )
    model = LlamaForCausalLM(_llama_config(tokenizer, plan))
    blocks = _text_blocks(tokenizer, prose, length=plan.text_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    losses: list[float] = []
    model.train()
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * _cosine(step, plan.steps)
        rows = [_turn_row(tokenizer, template, rng.choice(conversations), rng) for _ in range(plan.turn_rows)]
        answers, everything = _causal_losses(model, rows, pad=_id(tokenizer, PAD))
        text = [_Row(ids, [False] * len(ids)) for ids in rng.choices(blocks, k=plan.text_rows)]
        _, prose_loss = _causal_losses(model, text, pad=_id(tokenizer, PAD))
        # Answers are what the model is for; questions and prose are there for the words.
        (answers + plan.other_weight * (everything + prose_loss)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(answers.item())
    _save_language_model(model, tokenizer, out)
    tail = losses[-max(1, len(losses) // 20) :]
    return sum(tail) / len(tail)


def pretrain_encoder(
    out: Path,
    *,
    snapshot: Snapshot,
    encoder: str = "vit-tiny-p16-64",
    seed: int,
    dataset: str = "easy-vqa-train",
    plan: MaskedImagePlan | None = None,
) -> float:
    """Pretrain an encoder on masked patches: it sees an image with holes and predicts every pixel.

    A linear layer reads the pixels of a patch from the encoder's feature there (as SimMIM, arXiv:2111.09886), so it
    works for any encoder whose feature map has one cell a patch. No label and no text is used.

    Args:
        out: Folder to write: ``config.json`` and ``model.safetensors`` (bfloat16).
        snapshot: Where the data set lives.
        encoder: Row of ENCODERS.
        seed: Of weights, order and masks.
        dataset: Training data set; validation and test sets must not be named here.
        plan: Training.

    Returns:
        Mean squared error of the last epoch at the masked patches, in units of the normalised pixels.

    Raises:
        SnapshotError: No such data set.
    """
    plan = plan or MaskedImagePlan()
    torch.manual_seed(seed)
    transform = encoder_transform(encoder)
    pixels = torch.stack(
        [
            torch.from_numpy(transform_image(decode_image(image.data), transform))
            for record in _read(snapshot, dataset)
            for image in record.images
        ]
    )
    model = build_encoder(encoder)
    patch = model.stride
    head = nn.Linear(model.channels, 3 * patch * patch)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    total = plan.epochs * math.ceil(len(pixels) / plan.batch_size)
    step, epoch_error = 0, 0.0
    model.train()
    for _ in range(plan.epochs):
        errors = []
        for chosen in torch.randperm(len(pixels)).split(plan.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * _cosine(step, total)
            hidden, shown = _masked_loss(model, head, pixels[chosen], patch=patch, ratio=plan.mask_ratio)
            (hidden + plan.visible_weight * shown).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            errors.append(hidden.item())
            step += 1
        epoch_error = sum(errors) / len(errors)
    config = {
        "encoder": encoder,
        "image_size": model.image_size,
        "pretraining": f"masked patches of {dataset}, {plan.epochs} epochs",
        "dtype": "bfloat16",
    }
    with new_folder(out) as folder:
        weights = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return epoch_error


def train_tokenizer(texts: Sequence[str], *, vocabulary: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer that puts ``<s>`` in front and knows ``</s>``, ``<pad>`` and ``<image>``."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD, IMAGE],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Words follow a space in a conversation: learn them with it.
    tokenizer.train_from_iterator([f"USER: {text} ASSISTANT: {text}" for text in texts], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, _id(tokenizer, BOS))]
    )
    return tokenizer


def standard_library_prose() -> Iterator[str]:
    """Docstrings of the standard library and the help topics of ``pydoc``, one line each, in a fixed order."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield re.sub(r"\s+", " ", topics[name]).strip()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 80:
                    yield re.sub(r"\s+", " ", text).strip()


def _read(snapshot: Snapshot, dataset: str) -> Iterator[Record]:
    return iter(RecordReader(snapshot.shards(dataset)))


def _pairs(record: Record) -> list[tuple[str, str]]:
    """Questions and answers of a record, without image placeholders."""
    pairs = []
    for question, answer in zip(record.turns[0::2], record.turns[1::2], strict=True):
        pairs.append((question.text.replace(IMAGE, "").strip(), answer.text.strip()))
    return pairs


def _turn_row(
    tokenizer: tokenizers.Tokenizer, template: str, pairs: Sequence[tuple[str, str]], rng: random.Random
) -> _Row:
    question, answer = rng.choice(pairs)
    context = tokenizer.encode(_context(pairs, rng), add_special_tokens=False).ids[:MAX_CONTEXT_TOKENS]
    encoded = encode_conversation(
        tokenizer,
        CHAT_TEMPLATES[template],
        [("human", f"{IMAGE}\n{question}" if context else question), ("gpt", answer)],
        image_tokens=[len(context)] if context else [],
        image_token_id=_id(tokenizer, IMAGE),
        system="",
    )
    ids = list(encoded.input_ids)
    for start, length in encoded.image_spans:
        ids[start : start + length] = context
    return _Row(ids, encoded.supervised)


def _context(pairs: Sequence[tuple[str, str]], rng: random.Random) -> str:
    """Text that stands where the image will: nothing, words that name what is seen, or other turns on the image."""
    kind = rng.random()
    if kind < 0.25:
        return ""
    if kind < 0.8:
        words = sorted({answer for _, answer in pairs if answer not in ("yes", "no")})
        repeated = [word for word in words for _ in range(rng.randint(1, 8))]
        rng.shuffle(repeated)
        return " ".join(repeated)
    others = rng.sample(list(pairs), k=min(len(pairs), rng.randint(1, 3)))
    return " ".join(f"{question} {answer}." for question, answer in others)


def _id(tokenizer: tokenizers.Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    assert number is not None
    return number


def _llama_config(tokenizer: tokenizers.Tokenizer, plan: LanguageModelPlan) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=plan.hidden,
        intermediate_size=plan.feed_forward,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        max_position_embeddings=plan.max_positions,
        tie_word_embeddings=True,
        bos_token_id=_id(tokenizer, BOS),
        eos_token_id=_id(tokenizer, EOS),
        pad_token_id=_id(tokenizer, PAD),
        attn_implementation="sdpa",
    )


def _text_blocks(tokenizer: tokenizers.Tokenizer, prose: Sequence[str], *, length: int) -> list[list[int]]:
    stream = [token for encoding in tokenizer.encode_batch(list(prose)) for token in encoding.ids]
    if len(stream) < length:
        raise RecordError(f"{len(stream)} tokens of prose", f"at least {length}", "Use a Python with its library.")
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


def _causal_losses(model: LlamaForCausalLM, rows: Sequence[_Row], *, pad: int) -> tuple[Tensor, Tensor]:
    """Mean next-token loss in nats at supervised tokens and at all tokens of right-padded ``[R, T]`` rows."""
    longest = max(len(row.ids) for row in rows)
    ids_RT = torch.tensor([row.ids + [pad] * (longest - len(row.ids)) for row in rows])
    real_RT = torch.tensor([[True] * len(row.ids) + [False] * (longest - len(row.ids)) for row in rows])
    answer_RT = torch.tensor([row.supervised + [False] * (longest - len(row.ids)) for row in rows])
    # Right padding under a causal mask: no real position can see a pad, so no attention mask is needed.
    logits_RTV = model(input_ids=ids_RT, use_cache=False).logits
    loss_RT = functional.cross_entropy(logits_RTV[:, :-1].transpose(1, 2), ids_RT[:, 1:], reduction="none")
    at_answers, at_all = answer_RT[:, 1:].float(), real_RT[:, 1:].float()
    return (loss_RT * at_answers).sum() / at_answers.sum().clamp(min=1), (loss_RT * at_all).sum() / at_all.sum()


def _masked_loss(
    model: nn.Module, head: nn.Module, pixels_BCHW: Tensor, *, patch: int, ratio: float
) -> tuple[Tensor, Tensor]:
    """Mean squared pixel error at masked and at visible patches."""
    batch, _, height, width = pixels_BCHW.shape
    grid_h, grid_w = height // patch, width // patch
    masked = torch.rand(batch, 1, grid_h, grid_w) < ratio
    holes = functional.interpolate(masked.float(), scale_factor=patch, mode="nearest")
    features_BCHW = model(pixels_BCHW * (1 - holes))
    predicted_BNP = head(features_BCHW.flatten(2).transpose(1, 2))
    target_BNP = functional.unfold(pixels_BCHW, kernel_size=patch, stride=patch).transpose(1, 2)
    error_BN = (predicted_BNP - target_BNP).square().mean(dim=2)
    hidden_BN = masked.flatten(1).float()
    hidden = (error_BN * hidden_BN).sum() / hidden_BN.sum().clamp(min=1)
    shown = (error_BN * (1 - hidden_BN)).sum() / (1 - hidden_BN).sum().clamp(min=1)
    return hidden, shown


def _cosine(step: int, total: int, *, warmup: float = 0.05) -> float:
    position = (step + 1) / total
    if position < warmup:
        return position / warmup
    return 0.5 * (1 + math.cos(math.pi * (position - warmup) / (1 - warmup)))


def _save_language_model(model: LlamaForCausalLM, tokenizer: tokenizers.Tokenizer, out: Path) -> None:
    with new_folder(out) as folder:
        # Weights in bfloat16 halve the file; the configuration says float32, which is what they are computed in.
        model.to(torch.bfloat16)
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = "float32"
        config.pop("transformers_version", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (folder / "generation_config.json").unlink(missing_ok=True)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, additional_special_tokens=[IMAGE]
        )
        fast.save_pretrained(folder)
