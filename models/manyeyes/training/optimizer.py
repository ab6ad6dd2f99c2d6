"""Which parameters train, at which learning rate, and how the rate moves."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from manyeyes.errors import RecipeError, did_you_mean
from manyeyes.recipe import Schedule, StageSpec

ParameterGroups = Mapping[str, list[tuple[str, nn.Parameter]]]


def split_groups(groups: ParameterGroups, train: Mapping[str, float]) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Make each part of a group that ``train`` names with its own rate, such as ``fusion.projections``, a group.

    Args:
        groups: The model's parameters by group.
        train: Learning rates as a recipe gives them.

    Raises:
        RecipeError: A part that the model does not have.
    """
    split = {group: list(parameters) for group, parameters in groups.items()}
    for part in train:
        group = part.partition(".")[0]
        if part in split or group not in split:
            continue
        own = [(name, parameter) for name, parameter in split[group] if name.startswith(f"{part}.")]
        if not own:
            known = sorted({".".join(name.split(".")[:2]) for name, _ in split[group] if name.startswith(f"{group}.")})
            raise RecipeError(
                f'train names "{part}"',
                f"this model's {group} has {', '.join(known) or 'nothing to train'}",
                f"{did_you_mean(part, known)}Name one of them, or {group}.",
            )
        taken = {name for name, _ in own}
        split[group] = [pair for pair in split[group] if pair[0] not in taken]
        split[part] = own
    return split


def learning_rates(train: Mapping[str, float], groups: ParameterGroups) -> dict[str, float]:
    """The learning rate of every group that trains.

    ``encoders`` stands for every encoder that has no rate of its own.

    Args:
        train: Learning rates as a recipe gives them.
        groups: The model's parameters by group.

    Raises:
        RecipeError: Nothing that the model has would train.
    """
    rates: dict[str, float] = {}
    for group, parameters in groups.items():
        rate = train.get(group, train.get("encoders") if group.startswith("encoders.") else None)
        if rate is not None and parameters:
            rates[group] = rate
    if not rates:
        raise RecipeError(
            f"train names {', '.join(train)}",
            f"a group with parameters is needed; this model has {', '.join(g for g, p in groups.items() if p)}",
            "Name one of them.",
        )
    return rates


def freeze_others(groups: ParameterGroups, rates: Mapping[str, float]) -> dict[str, nn.Parameter]:
    """Let exactly the groups with a learning rate require gradients.

    A parameter that a trained and a frozen group share is trained.

    Returns:
        The parameters that train, by name, in the model's order.
    """
    for group, parameters in groups.items():
        for _, parameter in parameters:
            parameter.requires_grad_(group in rates)
    trained = {name: parameter for group in rates for name, parameter in groups[group]}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def build_optimizer(groups: ParameterGroups, rates: Mapping[str, float], stage: StageSpec) -> torch.optim.AdamW:
    """AdamW over the trained groups; weight decay on matrices only, as usual for transformers.

    Each of its parameter groups carries ``base_lr``, the recipe's rate, which ``set_learning_rates`` scales.
    """
    parameter_groups = []
    for group, rate in rates.items():
        matrices = [parameter for _, parameter in groups[group] if parameter.ndim >= 2]
        others = [parameter for _, parameter in groups[group] if parameter.ndim < 2]
        for parameters, decay in ((matrices, stage.weight_decay), (others, 0.0)):
            if parameters:
                parameter_groups.append({"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay})
    # The default second beta is that of language model training (LLaMA, arXiv:2302.13971): 0.999 averages over more
    # steps than a short stage has. docs/log.md has the trial.
    return torch.optim.AdamW(parameter_groups, betas=stage.betas, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every rate to its base times ``factor``.

    Returns:
        The highest rate.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return float(max(group["lr"] for group in optimizer.param_groups))


def schedule_factor(schedule: Schedule, *, step: int, steps: int) -> float:
    """What the learning rates are multiplied with at a step.

    Args:
        schedule: Shape, and how long the rise from 0 lasts.
        step: From 0.
        steps: Of the whole stage.

    Returns:
        Above 0 and at most 1; ``cosine`` and ``linear`` reach 0 one step after the last.
    """
    warmup = math.ceil(schedule.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    position = (step - warmup) / max(1, steps - warmup)
    if schedule.kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * position))
    if schedule.kind == "linear":
        return 1 - position
    return 1.0
