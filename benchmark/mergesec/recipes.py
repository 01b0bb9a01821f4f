"""How an expert is fine-tuned: one model for grids, cards, steps and training. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mergesec.errors import UsageError, nearest


def _one_of(*values: str) -> Any:
    return field(default=values[0], metadata={"choices": values})


def _at_least_one(default: float) -> Any:
    return field(default=default, metadata={"positive": True})


def _share(default: float) -> Any:
    return field(default=default, metadata={"most": 1})


def _later(default: Any, *choices: str) -> Any:
    """Added after results were stored: at its default it is left out of the keys, so they stay valid."""
    return field(default=default, metadata={"later": True, "choices": choices})


@dataclass(frozen=True)
class Recipe:
    """How an expert is fine-tuned. Decides results, so it enters the step's key."""

    optimizer: str = _one_of("adamw", "sgd")
    learning_rate: float = _at_least_one(3e-4)
    weight_decay: float = 0.01
    schedule: str = _one_of("cosine", "constant")
    warmup: float = _share(0.1)
    """Share of the steps in which the learning rate rises."""
    epochs: int = _at_least_one(8)
    batch_size: int = _at_least_one(64)
    gradient_clip: float = 1.0
    """Largest norm of a step's gradient; 0 = any."""
    precision: str = _one_of("float32", "bfloat16", "float16")
    max_train: int = 0
    """0 = every training row."""
    lora_rank: int = 0
    """0 = full fine-tuning; else only an update of this rank per linear map of the blocks is trained."""
    lora_alpha: float = _at_least_one(16.0)
    """The low-rank update counts ``lora_alpha / lora_rank`` times."""
    steps: int = _later(0)
    """Optimizer steps; 0 = as many as ``epochs`` make."""
    augment: str = _later("none", "none", "crop", "flip", "crop+flip")
    """Random views of training images: ``none``, ``crop`` (padded by an eighth), ``flip`` or ``crop+flip``."""
    half: str = _later("", "", "first", "second")
    """Contributors see only this half of the training rows, drawn once per task; further experts that a defender
    has (siblings) are trained on the other one. Empty: both see all rows."""


_FIELDS = {f.name: f for f in fields(Recipe)}
_TYPES = {"str": str, "int": int, "float": float}


def check_recipe(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with numbers in their field's type; UsageError naming ``where.field`` for an unknown field, a
    wrong type, NaN, infinity, or a value out of range."""
    return {name: _check(where, name, value) for name, value in given.items()}


def _check(where: str, name: str, value: Any) -> Any:
    if name not in _FIELDS:
        raise UsageError(f"{where}.{name}", f"unknown{nearest(name, _FIELDS)}")
    spot, facts = f"{where}.{name}", _FIELDS[name].metadata
    kind = _TYPES[str(_FIELDS[name].type)]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (kind is float and not number) or (kind is not float and type(value) is not kind):
        raise UsageError(spot, f"expected {kind.__name__}, got {value!r}")
    choices = facts.get("choices")
    if choices and value not in choices:
        raise UsageError(spot, f"{value!r}{nearest(value, choices)}")
    if number:
        if not math.isfinite(value):
            raise UsageError(spot, f"must be finite, got {value!r}")
        if value <= 0 and facts.get("positive"):
            raise UsageError(spot, f"must be positive, got {value!r}")
        if value < 0:
            raise UsageError(spot, f"must not be negative, got {value!r}")
        if value > facts.get("most", math.inf):
            raise UsageError(spot, f"is a share, at most {facts['most']}, got {value!r}")
    return kind(value)


def other_half(recipe: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    """The recipe of whoever shares no rows with those of ``recipe``; the same one if that takes all rows."""
    other = {"first": "second", "second": "first"}
    return tuple((name, other[value] if name == "half" and value else value) for name, value in recipe)


def recipe_identity(bound: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What of a recipe enters keys, sorted: what was given, later fields at their default left out."""
    later = {f.name: f.default for f in _FIELDS.values() if f.metadata.get("later")}
    return tuple(sorted((k, v) for k, v in bound.items() if k not in later or v != later[k]))
