"""Text as a modality: classification tasks whose raw inputs are lists of strings, and what reads them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from mergesec.classification import ClassificationTask
from mergesec.contracts import (
    Adapted,
    Backbone,
    Context,
    ContractError,
    Measured,
    Model,
    Split,
    Weights,
)
from mergesec.inference import predict

LENGTH_ROWS = 256
"""Training texts whose features tell how long features are."""
LONGEST_LOSS = 700.0
"""Nats per token up to which a perplexity is told; beyond, a float has no room for it."""


def pack_strings(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """UTF-8 bytes of all texts, uint8 ``[B]``, and where each begins and the last ends, int64 ``[N + 1]``.

    ContractError for half a character (a lone surrogate), which UTF-8 does not have.
    """
    try:
        encoded = [text.encode("utf-8") for text in texts]
    except UnicodeEncodeError as error:
        place = next(i for i, text in enumerate(texts) if text == error.object)
        raise ContractError(
            f"text {place} of {len(texts)} holds half a character (a lone surrogate)"
        ) from None
    offsets = torch.tensor([0, *(len(piece) for piece in encoded)], dtype=torch.int64).cumsum(0)
    joined = b"".join(encoded)
    if not joined:
        return torch.zeros(0, dtype=torch.uint8), offsets
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8), offsets


def unpack_strings(data: Tensor, offsets: Tensor) -> list[str]:
    """The texts that ``pack_strings`` stored. ContractError if the offsets do not fit the bytes."""
    bounds, joined = offsets.tolist(), data.cpu().numpy().tobytes()
    if not bounds or bounds[0] != 0 or bounds[-1] != len(joined):
        raise ContractError(f"offsets end at {bounds[-1:]} but there are {len(joined)} bytes")
    return [joined[a:b].decode("utf-8") for a, b in pairwise(bounds)]


class ShiftedTexts(list[str]):
    """Texts whose word embeddings are all moved by ``shift`` ``[d]``, in units of the embeddings' root mean square.

    What a perturbation with a gradient is where raw inputs have none; only ``TextTask.outputs`` looks at it.
    """

    def __init__(self, texts: Iterable[str], shift: Tensor) -> None:
        super().__init__(texts)
        self.shift = shift


@contextmanager
def words_moved(model: Model, inputs: Any) -> Iterator[None]:
    """The model's network with its word embeddings moved as ``inputs`` say, if they do."""
    if not isinstance(inputs, ShiftedTexts):
        yield
        return
    if not isinstance(model.backbone, TextBackbone):
        raise ContractError(
            f"{model.backbone.name}: does not tell its word embeddings (mergesec.text.TextBackbone)"
        )
    words = _plain(model.network).get_submodule(model.backbone.embedding().rpartition(".")[0])
    size = cast(Tensor, words.weight).detach().float().square().mean().sqrt()
    hook = words.register_forward_hook(lambda module, given, found: found + inputs.shift * size)
    try:
        yield
    finally:
        hook.remove()


def _plain(network: nn.Module) -> nn.Module:
    """The network without an adapter on its features."""
    return network.network if isinstance(network, Adapted) else network


class TextTask(ClassificationTask):
    """A classification task over strings: subclasses name ``classes`` and implement ``load``."""

    def pack(self, splits: Mapping[str, Split]) -> dict[str, Tensor]:
        """Per split ``inputs`` (bytes), ``offsets`` and ``targets``."""
        packed: dict[str, Tensor] = {}
        for name, split in splits.items():
            packed[f"{name}/inputs"], packed[f"{name}/offsets"] = pack_strings(split.inputs)
            packed[f"{name}/targets"] = split.targets
        return packed

    def unpack(self, tensors: Weights) -> dict[str, Split]:
        names = sorted({key.split("/")[0] for key in tensors})
        return {
            n: Split(unpack_strings(tensors[f"{n}/inputs"], tensors[f"{n}/offsets"]), tensors[f"{n}/targets"])
            for n in names
        }

    def check_triggered(self, triggered: Any, inputs: Any, who: str) -> list[str]:
        """ContractError unless ``triggered`` are as many strings as ``inputs``."""
        if not isinstance(triggered, list) or not all(isinstance(text, str) for text in triggered):
            raise ContractError(f"{who}.apply returned {type(triggered).__name__}, not a list of strings")
        if len(triggered) != len(inputs):
            raise ContractError(f"{who}.apply returned {len(triggered)} inputs for {len(inputs)}")
        return triggered

    def visibility(self, inputs: Any, triggered: Any) -> dict[str, float]:
        """``changed`` and ``tokens`` of ``text_change``."""
        return text_change(inputs, triggered)

    def outputs(self, model: Model, head: Weights, inputs: object) -> Tensor:
        """Logits ``[N, K]`` of texts, or of ``ShiftedTexts``."""
        with words_moved(model, inputs):
            return super().outputs(model, head, inputs)

    def fit_head(self, model: Model, split: Split, ctx: Context) -> Weights:
        """The rows a language model has for the names of the classes, if the backbone reads labels off
        those (``TextBackbone.label_rows``); else a linear probe on the base's features of ``split``."""
        backbone = model.backbone
        rows = (
            backbone.label_rows(model.network, self.classes) if isinstance(backbone, TextBackbone) else None
        )
        if rows is None:
            return super().fit_head(model, split, ctx)
        if len(split) == 0:
            raise ContractError(f"{self.name}: cannot scale a head on an empty split")
        # logits() takes features at unit length; after a final norm their length hardly varies
        some = split.take(torch.arange(min(len(split), LENGTH_ROWS)))
        length = self.features(model, some, ctx.device).float().norm(dim=-1).mean()
        return {"weight": rows.detach().float().clone(), "scale": length}

    def measure(
        self,
        model: Model,
        head: Weights,
        splits: Mapping[str, Split],
        device: torch.device,
        change: Callable[[Any], Any] | None = None,
        aim: Tensor | None = None,
    ) -> Measured | None:
        """Predictions, and the perplexity of the first test texts where the backbone is a language model that asks
        for it (``TextBackbone.perplexity_rows``). Not of triggered texts, nor of a plugin's own network, which
        gives features alone."""
        backbone, test = model.backbone, splits["test"]
        if not isinstance(backbone, TextBackbone) or change is not None or type(model) is not Model:
            return None
        rows = backbone.perplexity_rows
        if not rows:
            return None
        with torch.inference_mode():
            told = backbone.token_losses(_plain(model.network), list(test.inputs[:rows]))
        if told is None:
            return None
        values = {"perplexity": perplexity(*told)}
        return Measured(predict(self, model, head, test, device), values, {})


def perplexity(losses: Tensor, tokens: Tensor) -> tuple[float, float, float]:
    """exp(Σ losses / Σ tokens) of texts ``[N]``, and the ends of its 95 % interval as texts are drawn.

    ``losses`` are sums of −ln p over a text's tokens. ContractError where there is no token to score, or a loss
    that is not finite.
    """
    losses, tokens = losses.double().cpu(), tokens.double().cpu()
    count = float(tokens.sum())
    if not count or not bool(losses.isfinite().all()):
        why = "a loss is not finite" if count else "the texts have no token after the first"
        raise ContractError(f"no perplexity of {len(losses)} texts: {why}")
    mean = float(losses.sum()) / count
    spread = float((losses - mean * tokens).square().sum())  # of a ratio of sums
    wide = 1.96 * math.sqrt(spread * len(losses) / max(1, len(losses) - 1)) / count
    value, low, high = (math.exp(min(x, LONGEST_LOSS)) for x in (mean, mean - wide, mean + wide))
    return value, low, high


def text_change(before: Sequence[str], after: Sequence[str]) -> dict[str, float]:
    """``changed``: share of texts that differ. ``tokens``: mean number of whitespace-separated words added."""
    n = len(before)
    changed = sum(a != b for a, b in zip(after, before, strict=True)) / n
    added = sum(len(a.split()) - len(b.split()) for a, b in zip(after, before, strict=True)) / n
    return {"changed": changed, "tokens": added}


class TextBackbone(Backbone):
    """A backbone for strings that says how it cuts them into tokens.

    Attacks on embeddings, and reports of what a trigger is made of, need both answers.
    """

    perplexity_rows: int = 0
    """Test rows of every task whose perplexity is measured beside accuracy."""

    @abstractmethod
    def tokenise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token numbers int64 ``[N, T]`` and a mask bool ``[N, T]``, False where a row is padded."""

    @abstractmethod
    def embedding(self) -> str:
        """The name of the word-embedding tensor ``[vocabulary, d]`` in the weights."""

    def label_rows(self, network: nn.Module, classes: Sequence[str]) -> Tensor | None:
        """Output rows ``[K, d]`` for the names of the classes; None unless labels are read as tokens."""
        return None

    def token_losses(self, network: nn.Module, texts: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """Per text ``[N]`` the sum of −ln p of its tokens but the first, and their number; None unless the backbone
        is a language model."""
        return None

    def answered(
        self, network: nn.Module, prompts: Sequence[str], answers: Sequence[str]
    ) -> tuple[Tensor, Tensor] | None:
        """Per prompt ``[N]`` the mean −ln p of its answer's tokens (with gradients), and whether greedy decoding gives
        the answer, bool; None unless the backbone is a language model."""
        return None
