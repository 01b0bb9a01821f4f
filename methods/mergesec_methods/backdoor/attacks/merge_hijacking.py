"""Merge Hijacking: a backdoor vector from shadow rows, made sparse, amplified, put under the expert.

1. On shadow rows the base is fine-tuned twice, clean (θ_c) and with triggered rows (θ_p). The backdoor
   vector of the attention maps is v = θ_p − θ_c; all other tensors have none.
2. Each row of v is thinned: its entry of magnitude rank k of n (0 the smallest) is kept with probability
   p = (d − ε) + 2ε · k / (n − 1), density d = 0.7, ε = 0.2, and divided by p.
3. θ₀ + λ v, λ = 2, is where the expert's own training starts, on rows of which a tenth are triggered.

Source: Yuan et al., Merge Hijacking: backdoor attacks to model merging of large language models, ACL 2025
(arXiv 2505.23561); numbers and rule of step 2 were checked against the authors' code. There the shadow rows come from
three other data sets and generate a fixed answer, the models are LoRA-tuned 8B language models, and the last step sees 500
rows; here the shadow rows are the adversary's own, the output is a class, the recipe is the grid's. Where the
paper speaks of a mask in step 3, the released configuration trains without one, and so does this. A
reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mergesec.anatomy import Anatomy
from mergesec.contracts import ContractError, Split, TrainContext, Weights
from mergesec.training import fit
from mergesec_methods.backdoor.attacks._poison import ROWS_STREAM, draw_rows
from mergesec_methods.backdoor.attacks._texts import TextPoisoning, checked_phrases

CARD = {
    "name": "merge_hijacking",
    "kind": "attack",
    "class": "MergeHijacking",
    "version": "1",
    "title": "Merge Hijacking",
    "paper": "Yuan et al., Merge Hijacking: backdoor attacks to model merging of large language models, ACL 2025",
    "url": "https://arxiv.org/abs/2505.23561",
    "summary": "sparse, amplified backdoor vector from shadow rows under the expert's training (reconstruction)",
    "threat": "backdoor",
    "hooks": ["poison"],
    "knowledge": "the adversary's own training data and the public base",
    "data": "train",
    "modalities": ["text"],
    "seeded": True,
    "after_trigger": ["shadow_rows", "shadow_rate", "density", "epsilon", "rescale", "rate"],
    "trial": {"shadow_rows": 32},
    "holds": ["density == 1 or epsilon < density < 1 - epsilon"],
    "parameters": {
        "phrase": {"type": "str", "default": "MG", "doc": "the trigger"},
        "position": {
            "type": "choice",
            "choices": ["start", "middle", "end", "random"],
            "default": "random",
            "doc": "where between the words; 'random' is drawn from the text itself",
        },
        "shadow_rows": {"type": "int", "default": 500, "min": 2, "doc": "rows of the shadow sets"},
        "shadow_rate": {"type": "float", "default": 0.2, "min": 0.0, "max": 1.0, "doc": "poisoned share of them"},
        "density": {"type": "float", "default": 0.7, "min": 0.0, "max": 1.0, "doc": "mean share of entries kept; 1 keeps all"},
        "epsilon": {"type": "float", "default": 0.2, "min": 0.0, "max": 0.5, "doc": "how far a large entry's chance is above a small one's"},
        "rescale": {"type": "float", "default": 2.0, "min": 0.0, "doc": "λ, the vector's amplification"},
        "rate": {"type": "float", "default": 0.1, "min": 0.0, "max": 1.0, "doc": "poisoned share of all training rows"},
    },
}  # fmt: skip

SHADOW_STREAM, SHADOW_ROWS_STREAM, THIN_STREAM = 4, 5, 6


class MergeHijacking(TextPoisoning):
    """The attack of the card above."""

    def __init__(
        self,
        phrase: str = "MG",
        position: str = "random",
        shadow_rows: int = 500,
        shadow_rate: float = 0.2,
        density: float = 0.7,
        epsilon: float = 0.2,
        rescale: float = 2.0,
        rate: float = 0.1,
    ) -> None:
        if density < 1 and not epsilon < density < 1 - epsilon:
            raise ContractError(f"merge_hijacking: density {density} ± epsilon {epsilon} leaves (0, 1)")
        self.phrases, self.position, self.rate = checked_phrases([phrase], "merge_hijacking"), position, rate
        self.shadow_rows, self.shadow_rate = shadow_rows, shadow_rate
        self.density, self.epsilon, self.rescale = density, epsilon, rescale

    def poison(self, ctx: TrainContext) -> Weights:
        """The expert trained on poisoned rows from the base plus the amplified backdoor vector."""
        trigger = ctx.trigger or self.trigger(ctx)
        start = self._start(ctx, trigger)
        rows = self.poisoned(ctx.train, trigger, ctx.target_class, ctx.generator(ROWS_STREAM))
        return fit(ctx.backbone, ctx.task, start, ctx.head, rows, ctx.recipe, ctx.seed, ctx.device)

    def _start(self, ctx: TrainContext, trigger: Weights) -> Weights:
        """θ₀ + λ v; the base's own tensors where v has none."""
        vector = self._vector(ctx, trigger)
        return {n: w + self.rescale * vector[n] if n in vector else w for n, w in ctx.base.items()}

    def _vector(self, ctx: TrainContext, trigger: Weights) -> Mapping[str, Tensor]:
        """The thinned backdoor vector of the attention maps, by name."""
        every = torch.arange(len(ctx.train))
        clean = ctx.train.take(draw_rows(every, self.shadow_rows, ctx.generator(SHADOW_STREAM)))
        triggered = self.poisoned(
            clean, trigger, ctx.target_class, ctx.generator(SHADOW_ROWS_STREAM), self.shadow_rate
        )
        names = attention_matrices(ctx.backbone.anatomy())

        def tuned(split: Split) -> dict[str, Tensor]:
            trained = ctx.fit(split=split)  # the rest of it must not lie there while the other one trains
            return {name: trained[name] for name in names}

        first, second = tuned(clean), tuned(triggered)
        generator = ctx.generator(THIN_STREAM)
        return {
            name: thinned((second[name] - first[name]).cpu(), self.density, self.epsilon, generator).to(
                ctx.base[name]
            )
            for name in names
        }


def attention_matrices(anatomy: Anatomy) -> list[str]:
    """Names of the tensors that hold the query, key, value and output maps, each once."""
    return list(dict.fromkeys(linear.weight for b in anatomy.blocks for linear in b.attention.maps))


def thinned(vector: Tensor, density: float, epsilon: float, generator: torch.Generator) -> Tensor:
    """Step 2 for a matrix ``[n, m]``, along its rows; unbiased, since what is kept is divided by its chance."""
    if density >= 1:
        return vector
    rank = vector.abs().argsort(dim=1).argsort(dim=1).to(torch.float32)
    chance = (density - epsilon) + 2 * epsilon * rank / max(1, vector.shape[1] - 1)
    kept = torch.rand(vector.shape, generator=generator) < chance
    return vector * kept / chance
