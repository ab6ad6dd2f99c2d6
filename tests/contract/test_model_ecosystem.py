"""What works on any Hugging Face model works on this one."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

from manyeyes.model import ManyEyesForConditionalGeneration, ManyEyesProcessor, build_model
from tests.model_toys import toy_images, toy_spec, write_language_model

Parts = tuple[ManyEyesForConditionalGeneration, ManyEyesProcessor]


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return build_model(toy_spec(write_language_model(tmp_path / "language-model")), snapshot_path=None, seed=1)


def conversations() -> list[list[tuple[str, str]]]:
    return [
        [("human", "<image>\nwhat?"), ("gpt", "red")],
        [("human", "is it?"), ("gpt", "no"), ("human", "a?"), ("gpt", "b")],
    ]


# peft 0.21 asks for a property that transformers 5.23 renamed; gone once peft uses the new name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_trains_adapters_and_nothing_else(parts: Parts, tmp_path: Path) -> None:
    model, processor = parts
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    before = {name: value.detach().clone() for name, value in wrapped.named_parameters()}
    optimizer = torch.optim.SGD([value for value in wrapped.parameters() if value.requires_grad], lr=0.1)
    wrapped(**processor(images=toy_images(1), conversations=conversations())).loss.backward()
    optimizer.step()
    changed = {name for name, value in wrapped.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name and "language_model" in name for name in changed)
    batch = processor(images=toy_images(1), text="what?")
    answer = wrapped.generate(**batch, max_new_tokens=3, do_sample=False)
    wrapped.save_pretrained(tmp_path / "adapter")
    plain = wrapped.unload()
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert torch.equal(again.generate(**batch, max_new_tokens=3, do_sample=False), answer)


def test_trainer_lowers_the_loss(parts: Parts, tmp_path: Path) -> None:
    model, processor = parts
    batch = processor(images=toy_images(1), conversations=conversations())
    first = model(**batch).loss.item()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    Trainer(model, arguments, train_dataset=[0, 1] * 8, data_collator=lambda _: dict(batch)).train()
    assert model.eval()(**batch).loss.item() < 0.7 * first


def test_sampling_and_several_answers_a_question_keep_their_images(parts: Parts) -> None:
    model, processor = parts
    batch = processor(images=[[image] for image in toy_images(2)], text=["what?", "is it red?"])
    torch.manual_seed(0)
    answers = model.generate(**batch, do_sample=True, num_return_sequences=3, max_new_tokens=4)
    assert answers.shape == (6, batch["input_ids"].shape[1] + 4)
    assert torch.equal(answers[:3, : batch["input_ids"].shape[1]], batch["input_ids"][:1].expand(3, -1))


def test_logits_of_the_last_position_only(parts: Parts) -> None:
    model, processor = parts
    batch = processor(images=toy_images(1), text="what?")
    every = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=1).logits, every[:, -1:])
    assert isinstance(model(**batch, return_dict=False), tuple)
