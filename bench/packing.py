"""``python -m bench.packing``: fine-tuning a language model on unlike lengths, padded or in rows without padding.

Texts are easy-VQA's own questions and answers, put together to conversations with a long tail of lengths like
LLaVA-665k's; tokens of an image stand in front of half of them. Both sides train a Llama of 3.3 M parameters beside its
embeddings on the same samples a step: padded in micro-batches of so many records in the order in which they come, or
packed into micro-batches of so many tokens. Encoders are left out: both would run them alike. A run whose losses of a
step differ by more than 1e-4, or its gradients' cosine from 1, fails.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from bench import RESULTS, describe, write_result
from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import open_snapshot, read_default_remote, read_dvc_file
from manyeyes.model import build_processor
from manyeyes.model.branches import positions, summed_loss
from manyeyes.model.language_model import decoder_of
from manyeyes.model.segments import SEGMENTS, enable_packing
from manyeyes.processor import pad_conversations
from manyeyes.recipe import PackingSpec, load_recipe
from manyeyes.runtime.chat import Encoded
from manyeyes.training.packing import SampleSize, pack_row, share_out

STEP, MICRO_BATCH, TOKENS = 32, 8, 2048
IMAGE_TOKENS, LONGEST = 64, 1024
# The packing's own part of what is wanted beside TRL's trainer, which pads: that adds its logits of all positions.
GOAL = 1.3
SIZES = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}


def make_conversations(texts: list[tuple[list[int], list[int]]], *, seed: int) -> list[Encoded]:
    """A step's conversations.

    Args:
        texts: Tokens of questions, and of their answers.
        seed: Of what is drawn.
    """
    generator = random.Random(seed)
    made = []
    for _ in range(STEP):
        has_image = generator.random() < 0.5
        ids = [3] * IMAGE_TOKENS if has_image else [1]
        supervised = [False] * len(ids)
        # Lognormal, as far as LLaVA-665k's lengths are: a median of about 160 tokens of text, and a long tail.
        wanted = min(LONGEST, len(ids) + round(generator.lognormvariate(math.log(160), 0.9)))
        while len(ids) < wanted:
            question, answer = generator.choice(texts)
            answer = answer * generator.choice((1, 1, 2, 8, 24))
            ids += question + answer
            supervised += [False] * len(question) + [True] * len(answer)
        made.append(
            Encoded(
                input_ids=ids[:LONGEST],
                supervised=supervised[:LONGEST],
                image_spans=[(0, IMAGE_TOKENS)] if has_image else [],
            )
        )
    return made


def run_padded(model: transformers.PreTrainedModel, step: list[Encoded]) -> tuple[Tensor, int]:
    """Summed loss of a step, its gradients left behind, and the places that were computed."""
    total, places = torch.zeros(()), 0
    for start in range(0, STEP, MICRO_BATCH):
        batch = pad_conversations(step[start : start + MICRO_BATCH], pad_id=0, side="right", labels=True)
        hidden = decoder_of(model)(
            inputs_embeds=model.get_input_embeddings()(batch["input_ids"]),
            attention_mask=batch["attention_mask"],
            position_ids=positions(batch["attention_mask"]),
            use_cache=False,
        ).last_hidden_state
        loss, _ = summed_loss(model, hidden, batch["labels"])
        loss.backward()
        total, places = total + loss.detach(), places + batch["input_ids"].numel()
    return total, places


def run_packed(model: transformers.PreTrainedModel, step: list[Encoded]) -> tuple[Tensor, int]:
    """The same, packed; what plans the rows is part of it."""
    total, places = torch.zeros(()), 0
    sizes = [SampleSize(len(each.input_ids), len(each.image_spans)) for each in step]
    (shares,) = share_out(sizes, PackingSpec(tokens=TOKENS), num_ranks=1)
    for share in shares:
        row, segments = pack_row([], [step[place] for place in share])
        hidden = decoder_of(model)(
            inputs_embeds=model.get_input_embeddings()(row["input_ids"]),
            attention_mask=torch.zeros(1, 1, 1, 1),
            position_ids=segments.positions(),
            use_cache=False,
            **{SEGMENTS: segments},
        ).last_hidden_state
        loss, _ = summed_loss(model, hidden, row["labels"])
        loss.backward()
        total, places = total + loss.detach(), places + row["input_ids"].numel()
    return total, places


def main() -> int:
    """Run both sides in turn; exit 1 where they are not equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(__file__).resolve().parents[1]
    snapshot = open_snapshot(
        md5=read_dvc_file(root / "data.dvc").md5,
        remote=str(root / read_default_remote(root)),
        cache_dir=root / "runs" / "cache",
    )
    tokenizer = build_processor(load_recipe("tiny").model, snapshot_path=snapshot.path).rust_tokenizer
    reader = RecordReader(snapshot.shards("easy-vqa-train"))
    texts = []
    for number in range(100):
        turns = reader.read(number).turns
        for asked, answer in zip(turns[::2], turns[1::2], strict=True):
            ids = [tokenizer.encode(turn.text, add_special_tokens=False).ids for turn in (asked, answer)]
            texts.append((ids[0], ids[1]))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=LONGEST, **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    enable_packing(model, longest=LONGEST)
    cpu: list[tuple[float, float]] = []
    gap, cosine = 0.0, 1.0
    real = padded_places = packed_places = 0
    for number in range(arguments.rounds + 1):
        step = make_conversations(texts, seed=number)
        seconds, losses, gradients, places = [], [], [], []
        for run in (run_padded, run_packed):
            model.zero_grad()
            started = time.process_time()
            loss, computed = run(model, step)
            seconds.append(time.process_time() - started)
            losses.append(loss.item())
            places.append(computed)
            gradients.append(torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None]))
        gap = max(gap, abs(losses[1] / losses[0] - 1))
        cosine = min(cosine, torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0).item())
        if number:  # the first one warms up
            cpu.append((seconds[0], seconds[1]))
            real += sum(len(each.input_ids) for each in step)
            padded_places, packed_places = padded_places + places[0], packed_places + places[1]
    title = (
        f"packing, a language model on unlike lengths, {STEP} samples a step: padded batches of our own, {MICRO_BATCH} "
        f"each / rows of {TOKENS} tokens"
    )
    evidence = {
        "loss_gap": gap,
        "gradient_cosine": cosine,
        "padding_of_padded": 1 - real / padded_places,
        "padding_of_packed": 1 - real / packed_places,
        "equal": gap < 1e-4 and cosine > 0.9999,
    }
    return write_result(describe(title, cpu, goal=GOAL, equal=evidence), arguments.out / "packing.json")


if __name__ == "__main__":
    sys.exit(main())
