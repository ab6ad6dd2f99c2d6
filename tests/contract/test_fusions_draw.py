"""A seeded draw of one to five encoders, a fusion and a projector: each trains, saves, loads, generates and exports."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import LlamaConfig

from manyeyes.encoders import ENCODERS, FAMILIES, BlockEncoder, build_encoder
from manyeyes.export.graphs import export_vision
from manyeyes.fusion import FUSIONS
from manyeyes.model import ManyEyesConfig, ManyEyesForConditionalGeneration
from manyeyes.model.projector import PROJECTORS
from tests.pretended_cuda import pretended_cuda

NUM_CASES = 30
# An export takes ten times as long as all the rest of a case, most of it for the encoders, which have exports of their
# own among their tests: each fusion and each projector is exported behind these two.
LIGHT = ("vit-tiny-p16-64", "efficientnet-lite0")
OPTIONS: dict[str, dict[str, Any]] = {
    "spatial-vision-aggregator": {"channels": 16, "num_heads": 4, "depth": 1},
    "deformable-mining": {"num_heads": 4, "num_points": 2},
    "mixture-of-resolutions": {"num_groups": 2},
    "resampler": {"num_queries": 5, "depth": 1, "num_heads": 2},
    "c-abstractor": {"grid": 2, "depth": 1, "channels": 16},
}


@dataclass(frozen=True)
class Case:
    encoders: tuple[str, ...]
    strategy: str
    projector: str
    reinjects: bool

    def __str__(self) -> str:
        looks = "+looks" if self.reinjects else ""
        return f"{'+'.join(self.encoders)}-{self.strategy}-{self.projector}{looks}"


def _grid(encoder: str) -> int:
    row = ENCODERS[encoder]
    with torch.device("meta"):
        return build_encoder(encoder, small=True, image_size=row.small_image_size or 64).grid


def _draw() -> list[Case]:
    generator = random.Random(7)
    by_family: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for name, row in ENCODERS.items():
        by_family[row.family].append(name)
    projectors = [kind for kind in PROJECTORS if kind != "identity"]
    families = list(by_family)
    cases = []
    for number in range(NUM_CASES):
        strategy = list(FUSIONS)[number % len(FUSIONS)]
        fewest = FUSIONS[strategy].min_encoders
        count = max(fewest, number // len(FUSIONS) % 5 + 1)
        # One family after the other comes first, so that each is there; the rest is drawn.
        first = families[number % len(families)]
        rest = generator.sample([family for family in families if family != first], k=min(count, len(families)) - 1)
        encoders = [generator.choice(by_family[family]) for family in (first, *rest)]
        if strategy == "mixture-of-resolutions":
            encoders = ["vit-tiny-p16-64", *encoders[1:]]
        projector = projectors[number % len(projectors)]
        reinjects = strategy == "spatial-vision-aggregator" and projector in ("linear", "mlp")
        cases.append(Case(tuple(encoders), strategy, projector, reinjects))
    return cases


CASES = _draw()


def test_draw_has_every_family_fusion_projector_and_number_of_encoders() -> None:
    assert {ENCODERS[name].family for case in CASES for name in case.encoders} == set(FAMILIES)
    assert {case.strategy for case in CASES} == set(FUSIONS)
    assert {case.projector for case in CASES} == set(PROJECTORS) - {"identity"}
    assert {len(case.encoders) for case in CASES} == {1, 2, 3, 4, 5}
    assert any(case.reinjects for case in CASES)


def _model(case: Case) -> ManyEyesForConditionalGeneration:
    torch.manual_seed(11)
    entries, sizes = [], {}
    for place, encoder in enumerate(case.encoders):
        size = ENCODERS[encoder].small_image_size or 64
        if case.strategy == "mixture-of-resolutions" and place == 1 and _grid(encoder) not in (2, 4, 8, 16):
            # LLaVA-HR joins the slow encoders at the second's size, which must suit the first's 4 x 4 grid.
            encoder, size = "efficientnet-lite0", 128
        entries.append({"name": f"e{place}", "encoder": encoder, "image_size": size, "small": True})
        sizes[f"e{place}"] = size
    config = ManyEyesConfig(
        text_config=LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
        ),
        encoders=entries,
        fusion={"strategy": case.strategy, "grid": 4, "options": OPTIONS.get(case.strategy, {})},
        projector={"kind": case.projector, "depth": 2, "options": OPTIONS.get(case.projector, {})},
        reinjection={"start": 0, "stride": 1, "count": None} if case.reinjects else None,
    )
    return ManyEyesForConditionalGeneration(config)


def _batch(model: ManyEyesForConditionalGeneration) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    tokens = model.num_image_tokens
    width = tokens + 6
    pixels = {
        entry.name: torch.rand(2, 3, entry.image_size, entry.image_size, generator=generator)
        for entry in model.config.encoders
    }
    return {
        "input_ids": torch.randint(3, 64, (2, width), generator=generator),
        "attention_mask": torch.ones(2, width, dtype=torch.long),
        "pixel_values": pixels,
        "image_spans": torch.tensor([[0, 1, tokens, 0], [1, 2, tokens, 1]]),
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_combination_trains_saves_loads_and_generates(case: Case, tmp_path: Path) -> None:
    model = _model(case).train()
    batch = _batch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = model.fusion.state_dict() | {f"projector.{k}": v for k, v in model.projector.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in before.items()}
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    for name, encoder in model.encoders.items():
        assert any(p.grad is not None and p.grad.any() for p in encoder.parameters()), f"{name} learns"
    optimizer.step()
    after = model.fusion.state_dict() | {f"projector.{k}": v for k, v in model.projector.state_dict().items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert bool(loss.isfinite())

    model.eval()
    model.save_pretrained(tmp_path)
    loaded = ManyEyesForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        # Squeeze-and-excitation inside the C-Abstractor multiplies maps of one cell, where the order of a sum follows
        # the alignment of the weights in memory.
        tolerance = 1e-5 if case.projector == "c-abstractor" else 0
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=tolerance, rtol=0)
        answers = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert torch.equal(loaded.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None), answers)
    assert answers.shape == (2, batch["input_ids"].shape[1] + 3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_combination_runs_on_a_gpu(case: Case) -> None:
    model = _model(case).eval()
    batch = _batch(model)
    with torch.no_grad():
        loss = model(**batch, labels=batch["input_ids"]).loss
        answers = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
    with pretended_cuda() as cuda:
        model.to(cuda)
        moved = {name: values.to(cuda) for name, values in batch.items() if name != "pixel_values"}
        moved["pixel_values"] = {name: values.to(cuda) for name, values in batch["pixel_values"].items()}
        found = model(**moved, labels=moved["input_ids"]).loss
        found.backward()
        assert found.item() == pytest.approx(loss.item(), rel=1e-4)
        assert torch.equal(model.generate(**moved, max_new_tokens=3, do_sample=False, eos_token_id=None).cpu(), answers)


@pytest.mark.parametrize(
    ("strategy", "projector"),
    list(zip(FUSIONS, ["linear", "mlp", "pixel-unshuffle", "resampler", "c-abstractor", "mlp"], strict=True)),
)
def test_each_fusion_and_projector_exports(strategy: str, projector: str, tmp_path: Path) -> None:
    model, path = _model(Case(LIGHT, strategy, projector, reinjects=False)).eval(), tmp_path / "vision.onnx"
    batch = _batch(model)
    sizes = {entry.name: entry.image_size for entry in model.config.encoders}
    export_vision(model, sizes, path, opset=20)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    # Three images where the graph was traced with two.
    pixels = {name: torch.cat([values, values[:1].flip(-1)]) for name, values in batch["pixel_values"].items()}
    with torch.no_grad():
        expected = model.encode_images(pixels)
    (found,) = session.run(None, {name: values.numpy() for name, values in pixels.items()})
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_draw_puts_a_transformer_where_one_is_reached_into() -> None:
    for case in CASES:
        if case.strategy == "mixture-of-resolutions":
            assert isinstance(build_encoder(case.encoders[0], small=True), BlockEncoder)
