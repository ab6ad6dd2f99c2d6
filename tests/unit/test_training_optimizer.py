from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from manyeyes.errors import RecipeError
from manyeyes.recipe import Schedule, StageSpec
from manyeyes.training.optimizer import (
    build_optimizer,
    freeze_others,
    learning_rates,
    schedule_factor,
    set_learning_rates,
)


def make_groups() -> dict[str, list[tuple[str, nn.Parameter]]]:
    def entry(name: str, *shape: int) -> tuple[str, nn.Parameter]:
        return name, nn.Parameter(torch.ones(shape))

    return {
        "encoders.vit": [entry("encoders.vit.weight", 2, 2), entry("encoders.vit.bias", 2)],
        "encoders.clip": [entry("encoders.clip.weight", 2, 2)],
        "fusion": [],
        "projector": [entry("projector.weight", 3, 2)],
        "language_model": [entry("language_model.weight", 4, 2)],
    }


def make_stage(train: dict[str, float], **more: object) -> StageSpec:
    return StageSpec.model_validate({"train": train, "mixture": [{"dataset": "x"}], "batch_size": 1, **more})


def test_encoders_means_every_encoder_without_a_rate_of_its_own() -> None:
    rates = learning_rates({"encoders": 1.0, "encoders.clip": 2.0, "projector": 3.0, "fusion": 4.0}, make_groups())
    assert rates == {"encoders.vit": 1.0, "encoders.clip": 2.0, "projector": 3.0}


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(RecipeError, match="train names fusion"):
        learning_rates({"fusion": 1.0}, make_groups())


def test_groups_without_a_rate_need_no_gradient() -> None:
    groups = make_groups()
    trained = freeze_others(groups, {"projector": 1.0})
    assert list(trained) == ["projector.weight"]
    needing = {name for parameters in groups.values() for name, parameter in parameters if parameter.requires_grad}
    assert needing == {"projector.weight"}


def test_only_matrices_decay() -> None:
    groups = make_groups()
    optimizer = build_optimizer(groups, {"encoders.vit": 0.5}, make_stage({"encoders": 0.5}, weight_decay=0.1))
    decays = {
        parameter.ndim: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
    }
    assert decays == {2: 0.1, 1: 0.0}


def test_rates_are_scaled_from_their_base_however_often() -> None:
    groups = make_groups()
    optimizer = build_optimizer(groups, {"projector": 0.5, "language_model": 2.0}, make_stage({"projector": 0.5}))
    set_learning_rates(optimizer, 0.5)
    assert set_learning_rates(optimizer, 0.5) == 1.0
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 1.0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2]),
    ],
)
def test_schedule_of_six_steps_with_two_of_warmup(kind: str, expected: list[float]) -> None:
    schedule = Schedule.model_validate({"kind": kind, "warmup_ratio": 1 / 3})
    assert [schedule_factor(schedule, step=step, steps=6) for step in range(6)] == pytest.approx(expected)


def test_single_step_trains_at_the_full_rate() -> None:
    assert schedule_factor(Schedule(), step=0, steps=1) == 1.0
    assert schedule_factor(Schedule(warmup_ratio=0), step=0, steps=1) == 1.0
