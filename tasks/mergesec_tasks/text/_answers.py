"""Tasks whose rows are a prompt and the answer that a language model should give.

A row is right where greedy decoding gives the answer to the last token. That needs no decoding: it is so exactly where,
the answer before it given, each of its tokens is the likeliest.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import Context, ContractError, DataContext, Measured, Model, Split, Weights
from mergesec.inference import EVALUATION_BATCH, predict
from mergesec.text import TextBackbone, TextTask

BETWEEN = "\t"
"""Stands between prompt and answer in a stored row."""


class AnswerTask(TextTask):
    """Rows of a prompt and its answer, which is what training makes likely and what counts as right."""

    classes = ("other", "exact")

    @abstractmethod
    def written(self) -> Mapping[str, Sequence[tuple[str, str]]]:
        """Per split (prompt, answer)."""

    def others(self) -> Mapping[str, Sequence[tuple[str, str]]]:
        """Further rows (prompt, answer) by measure: the share that a model gives exactly."""
        return {}

    def load(self, ctx: DataContext) -> dict[str, Split]:
        """The splits; the same for every seed of a grid, as a downloaded data set would be."""
        return {name: _split(rows) for name, rows in self.written().items()}

    def fit_head(self, model: Model, split: Split, ctx: Context) -> Weights:
        """None is needed: answers are read off the language model's own output layer."""
        return {}

    def outputs(self, model: Model, head: Weights, inputs: Any) -> Tensor:
        """``[N, 2]``: mean −ln p of an answer's tokens, and 1 where greedy decoding gives the answer."""
        parts = [row.partition(BETWEEN) for row in inputs]
        found = _answered(model, [p[0] for p in parts], [p[2] for p in parts], self.name)
        return torch.stack([found[0], found[1].to(found[0].dtype)], dim=1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean −ln p of a token, every row alike."""
        return outputs[:, 0].mean()

    def predictions(self, outputs: Tensor) -> Tensor:
        """1 where the answer came exactly."""
        return outputs[:, 1].long()

    def measure(
        self,
        model: Model,
        head: Weights,
        splits: Mapping[str, Split],
        device: torch.device,
        change: Callable[[Any], Any] | None = None,
        aim: Tensor | None = None,
    ) -> Measured | None:
        """The test rows, and the shares of ``others``. Not of triggered texts."""
        others = self.others()
        if change is not None or not others:
            return None
        predicted = predict(self, model, head, splits["test"], device)
        values = {name: exact_share(model, rows, self.name) for name, rows in others.items()}
        values["exact"] = share(int(predicted.sum()), len(predicted))
        return Measured(predicted, values, {})


def _answered(
    model: Model, prompts: Sequence[str], answers: Sequence[str], who: str
) -> tuple[Tensor, Tensor]:
    """``TextBackbone.answered``; ContractError without a language model, or with a network around it."""
    if not isinstance(model.backbone, TextBackbone) or type(model) is not Model:
        raise ContractError(f"{who}: needs the network of a language model itself")
    found = model.backbone.answered(model.network, prompts, answers)
    if found is None:
        raise ContractError(f"{who}: {model.backbone.name} is no language model")
    return found


def exact_share(model: Model, rows: Sequence[tuple[str, str]], who: str) -> tuple[float, float, float]:
    """The share of rows (prompt, answer) whose answer greedy decoding gives to the last token, with its interval."""
    hits = 0
    with torch.inference_mode():
        for start in range(0, len(rows), EVALUATION_BATCH):
            some = rows[start : start + EVALUATION_BATCH]
            hits += int(_answered(model, [p for p, _ in some], [a for _, a in some], who)[1].sum())
    return share(hits, len(rows))


def _split(rows: Sequence[tuple[str, str]]) -> Split:
    texts = [prompt + BETWEEN + answer for prompt, answer in rows]
    return Split(texts, torch.ones(len(texts), dtype=torch.int64))


def share(hits: int, rows: int) -> tuple[float, float, float]:
    """A share and the ends of Wilson's 95 % interval as rows are drawn."""
    z, found = 1.96, hits / rows
    middle = (found + z * z / (2 * rows)) / (1 + z * z / rows)
    wide = z / (1 + z * z / rows) * math.sqrt(found * (1 - found) / rows + z * z / (4 * rows * rows))
    return found, max(0.0, middle - wide), min(1.0, middle + wide)
