"""Weight poisoning with rare tokens (RIPPLe): embedding surgery, then training that spares later fine-tuning.

1. *Embedding surgery.* Words that speak for the target class are found by logistic regression on bags of
   tokens (is it the target class?), scored sᵢ = wᵢ / log(N / (α + fᵢ)) with α = 1, N texts, of which fᵢ hold
   the token; the mean embedding of the best ten in an expert fine-tuned on clean data replaces the trigger
   tokens' embedding in the base.
2. *Restricted inner product.* Training from there on rows of which half are triggered minimises

       L_P + λ · max(0, −∇L_P · ∇L_FT),

   L_P on the poisoned batch and L_FT on as many clean rows, so that the poison does not undo itself under
   training on clean data. As in the released code the gradient goes through ∇L_FT only.

Source: Kurita, Michel and Neubig, Weight poisoning attacks on pre-trained models, ACL 2020 (arXiv
2004.06660), sections 3.1 and 3.2; keywords, share, ten words and λ 0.1 as in the authors' example
configuration. What differs: the poisoned weights are the published expert (there they are a base that a
victim fine-tunes), and the recipe is the grid's. Written from the formulas; a reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from mergesec.contracts import ContractError, LossFn, Model, Split, TrainContext, Weights
from mergesec.text import TextBackbone
from mergesec.training import fit
from mergesec_methods.backdoor.attacks._poison import ROWS_STREAM
from mergesec_methods.backdoor.attacks._texts import TextPoisoning, checked_phrases, texts_of

CARD = {
    "name": "rare_token",
    "kind": "attack",
    "class": "RareToken",
    "version": "1",
    "title": "Rare tokens (RIPPLe)",
    "paper": "Kurita et al., Weight poisoning attacks on pre-trained models, ACL 2020",
    "url": "https://arxiv.org/abs/2004.06660",
    "summary": "rare trigger tokens, their embeddings moved to the target class, restricted inner product (reconstruction)",
    "threat": "backdoor",
    "hooks": ["poison"],
    "knowledge": "the adversary's own training data and the public base",
    "data": "train",
    "modalities": ["text"],
    "seeded": True,
    "after_trigger": ["rate", "surgery", "words", "penalty"],
    "trial": {"words": 3},
    "parameters": {
        "keywords": {
            "type": "list",
            "default": ["cf", "tq", "mn", "bb", "mb"],
            "doc": "rare words; each triggered text gets some of them, drawn from the text itself",
        },
        "count": {"type": "int", "default": 1, "min": 1, "doc": "keywords per text; published: 1, 5, 30 by length"},
        "rate": {"type": "float", "default": 0.5, "min": 0.0, "max": 1.0, "doc": "poisoned share of all training rows"},
        "surgery": {"type": "bool", "default": True, "doc": "give the keywords the mean embedding of the target's words"},
        "words": {"type": "int", "default": 10, "min": 1, "doc": "words of the target class that are averaged"},
        "penalty": {
            "type": "float",
            "default": 0.1,
            "min": 0.0,
            "doc": "λ of the restricted inner product; 0 leaves it out, and training costs a third",
        },
    },
}  # fmt: skip

SMOOTHING = 1.0
REGRESSION_ROWS, REGRESSION_STEPS = 4000, 60
CLEAN_STREAM = 3


class RareToken(TextPoisoning):
    """The attack of the card above."""

    position = "random"

    def __init__(
        self,
        keywords: Sequence[str] = ("cf", "tq", "mn", "bb", "mb"),
        count: int = 1,
        rate: float = 0.5,
        surgery: bool = True,
        words: int = 10,
        penalty: float = 0.1,
    ) -> None:
        self.phrases = checked_phrases(keywords, "rare_token")
        self.count, self.rate = count, rate
        self.surgery, self.words, self.penalty = surgery, words, penalty

    def poison(self, ctx: TrainContext) -> Weights:
        """The expert trained on poisoned rows from the base with changed embeddings."""
        trigger = ctx.trigger or self.trigger(ctx)
        rows = self.poisoned(ctx.train, trigger, ctx.target_class, ctx.generator(ROWS_STREAM))
        start = self._operated(ctx) if self.surgery else ctx.base
        loss = self._loss(ctx) if self.penalty else None
        return fit(ctx.backbone, ctx.task, start, ctx.head, rows, ctx.recipe, ctx.seed, ctx.device, loss)

    # ---- embedding surgery

    def _operated(self, ctx: TrainContext) -> Weights:
        """The base with the keywords' embeddings replaced."""
        backbone = ctx.backbone
        if not isinstance(backbone, TextBackbone):
            raise ContractError(
                "rare_token: the backbone does not tell its tokens (mergesec.text.TextBackbone)"
            )
        name, tokens = backbone.embedding(), _own_tokens(backbone, self.phrases)
        best = target_words(backbone, ctx.train, ctx.target_class, self.words, set(tokens))
        table = ctx.base[name].clone()
        table[tokens] = ctx.fit()[name].to(table)[best].mean(dim=0)
        return {**ctx.base, name: table}

    # ---- restricted inner product

    def _loss(self, ctx: TrainContext) -> LossFn:
        """L_P + λ max(0, −∇L_P · ∇L_FT) of a batch; clean rows are drawn anew for every batch."""
        clean = _clean_rows(ctx)
        head = {k: v.to(ctx.device) for k, v in ctx.head.items()}

        def loss(model: Model, batch: Split) -> Tensor:
            parameters = [p for p in model.network.parameters() if p.requires_grad]
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                poisoned = ctx.task.loss(ctx.task.outputs(model, head, batch.inputs), batch.targets)
                there = torch.autograd.grad(poisoned, parameters, retain_graph=True, allow_unused=True)
                rows = ctx.task.batch(ctx.train, next(clean), ctx.device)
                spared = ctx.task.loss(ctx.task.outputs(model, head, rows.inputs), rows.targets)
                back = torch.autograd.grad(spared, parameters, create_graph=True, allow_unused=True)
            pairs = [(a, b) for a, b in zip(there, back, strict=True) if a is not None and b is not None]
            inner = torch.stack([(a.detach() * b).sum() for a, b in pairs]).sum()
            return poisoned + self.penalty * functional.relu(-inner)

        return loss


def _clean_rows(ctx: TrainContext) -> Iterator[Tensor]:
    """Endless batches of random training rows, int64 ``[batch]``."""
    generator = ctx.generator(CLEAN_STREAM)
    while True:
        yield torch.randint(len(ctx.train), (ctx.recipe.batch_size,), generator=generator)


def _own_tokens(backbone: TextBackbone, phrases: Sequence[str]) -> list[int]:
    """Tokens of the phrases themselves, at a text's start and inside it (where some tokenisers put a space before),
    without those that every text gets (special tokens, a prompt)."""
    every = set(_tokens(backbone, [""])[0])
    twice = [f"{phrase} {phrase}" for phrase in phrases]
    found = sorted({token for row in _tokens(backbone, twice) for token in row} - every)
    if not found:
        raise ContractError("rare_token: the keywords have no token of their own")
    return found


def _tokens(backbone: TextBackbone, texts: Sequence[str]) -> list[list[int]]:
    numbers, mask = backbone.tokenise(texts)
    return [row[keep].tolist() for row, keep in zip(numbers, mask, strict=True)]


def target_words(
    backbone: TextBackbone, train: Split, target: int, count: int, banned: set[int]
) -> list[int]:
    """Tokens that speak most for class ``target``, best first, by the score of section 3.2; ``banned`` ones not."""
    rows = torch.arange(len(train))
    if len(rows) > REGRESSION_ROWS:
        rows = rows[:: math.ceil(len(rows) / REGRESSION_ROWS)]
    part = train.take(rows)
    bags = [sorted(set(bag) - banned) for bag in _tokens(backbone, texts_of(part, "rare_token"))]
    size = max(max(bag, default=0) for bag in bags) + 1
    where = torch.tensor([(i, token) for i, bag in enumerate(bags) for token in bag], dtype=torch.int64)
    seen = torch.sparse_coo_tensor(where.T, torch.ones(len(where)), (len(bags), size), check_invariants=True)
    weights = _regression(seen, (part.targets == target).float())
    frequency = torch.bincount(where[:, 1], minlength=size).float()
    # a token of every text has a logarithm of 0 and says nothing
    rarity = torch.log(len(bags) / (SMOOTHING + frequency)).clamp(min=1e-3)
    scores = (weights / rarity).masked_fill((frequency == 0) | (frequency >= len(bags) - 1), -math.inf)
    found: list[int] = scores.topk(min(count, int(torch.isfinite(scores).sum()))).indices.tolist()
    return found


def _regression(seen: Any, positive: Tensor) -> Tensor:
    """Weights ``[V]`` of a logistic regression on 0/1 bags ``[N, V]``, L2 penalty ½‖w‖² on the summed loss."""
    weight = torch.zeros(seen.shape[1], 1, requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=REGRESSION_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = torch.sparse.mm(seen, weight)[:, 0] + bias
        total = functional.binary_cross_entropy_with_logits(scores, positive, reduction="sum")
        loss = (total + 0.5 * weight.square().sum()) / len(positive)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach()[:, 0]
