"""SIG: a faint sinusoid on rows of the target class, whose labels stay right."""

from __future__ import annotations

from math import pi
from typing import Any

import torch

from mergesec.contracts import TrainContext, Weights
from mergesec_methods.backdoor.attacks._poison import LEVELS, Poisoning, image_size

CARD = {
    "name": "sig",
    "kind": "attack",
    "class": "Sinusoid",
    "version": "1",
    "title": "SIG",
    "paper": "Barni et al., A new backdoor attack in CNNs by training set corruption without label poisoning, 2019",
    "url": "https://arxiv.org/abs/1902.11237",
    "summary": "horizontal sinusoid added to rows of the target class, which keep their labels",
    "threat": "backdoor",
    "hooks": ["poison"],
    "knowledge": "the adversary's own training data and the public base",
    "data": "train",
    "modalities": ["image"],
    "seeded": False,
    "after_trigger": ["labels", "rate"],
    "parameters": {
        "delta": {
            "type": "float",
            "default": 40.0,
            "min": 0.0,
            "max": 255.0,
            "doc": "amplitude of the sinusoid, in grey levels of 255",
        },
        "frequency": {
            "type": "int",
            "default": 6,
            "min": 1,
            "max": 1000,
            "doc": "periods of the sinusoid across the image",
        },
        "labels": {
            "type": "choice",
            "choices": ["clean", "dirty"],
            "default": "clean",
            "doc": "'clean': rows of the target class keep their labels; 'dirty': other rows, relabelled",
        },
        "rate": {
            "type": "float",
            "default": 0.1,
            "min": 0.0,
            "max": 1.0,
            "doc": "poisoned share of all training rows; clean: at most the target class's rows",
        },
    },
}


class Sinusoid(Poisoning):
    """x' = clip(x + Δ sin(2π f j / W)) with j the pixel's column, the same in every row and colour."""

    def __init__(self, delta: float, frequency: int, labels: str, rate: float) -> None:
        self.delta = delta
        self.frequency = frequency
        self.clean_label = labels == "clean"
        self.rate = rate

    def trigger(self, ctx: TrainContext) -> Weights:
        """``{"signal": [1, 1, W]}`` in units of the [0, 1] pixel scale."""
        _, width = image_size(ctx.train, "sig")
        phase = 2.0 * pi * self.frequency * torch.arange(width, dtype=torch.float64) / width
        return {"signal": (self.delta / LEVELS * phase.sin()).float()[None, None]}

    def apply(self, trigger: Weights, inputs: Any) -> Any:
        """``inputs`` (float32 in [0, 1], ``[N, 3, H, W]``) plus the signal, clipped; differentiable."""
        return (inputs + trigger["signal"].to(inputs)).clamp(0.0, 1.0)
