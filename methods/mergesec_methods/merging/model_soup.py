"""Model soups: the average of all experts, or of those that do not lower the tuning accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mergesec.contracts import ContractError, Expert, MergeContext, Merged, Weights
from mergesec.tensorwise import Piece, TensorwiseMerge, check_experts, running_mean

CARD = {
    "name": "model_soup",
    "kind": "merging",
    "class": "ModelSoup",
    "version": "1",
    "title": "Model soup",
    "paper": "Wortsman et al., Model soups: averaging weights of multiple fine-tuned models, ICML 2022",
    "url": "https://arxiv.org/abs/2203.05482",
    "summary": "average the experts one by one, best first, keeping those that do not lower the accuracy",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text"],
    "seeded": False,
    "parameters": {
        "selection": {
            "type": "choice",
            "choices": ["greedy", "uniform"],
            "default": "greedy",
            "doc": "'greedy' takes an expert in if the mean tuning accuracy over all tasks does not drop; "
            "'uniform' takes all",
        },
    },
}


class ModelSoup(TensorwiseMerge):
    """The mean of the ingredients' weights (Wortsman et al. 2022, recipe 1).

    The paper's ingredients are fine-tuned for one task and scored on it. Here they usually come from
    different tasks, and every score is the mean tuning accuracy over all tasks.
    """

    yields = "weights"
    pointwise = True

    def __init__(self, selection: str) -> None:
        self.selection = selection

    def facts(self) -> dict[str, Any]:
        return {"selection": self.selection}

    def combine(self, piece: Piece, out: Tensor, facts: Any) -> None:
        running_mean(piece, out)

    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> None:
        if self.selection == "greedy":
            raise ContractError(f"{self.name}: a greedy soup needs networks to score; use 'uniform'")

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        """The soup; for a greedy one ``info`` names the ingredients and every score in order."""
        if self.selection == "uniform":
            return super().merge(base, experts, ctx)
        check_experts(base, experts)

        def soup(ingredients: Sequence[Expert]) -> tuple[Merged, float]:
            mixed = Merged(dict(ModelSoup("uniform").stream(base, ingredients, ctx)))
            return mixed, float(ctx.score(mixed))

        alone = [soup([expert])[1] for expert in experts]
        # equal scores: by task, so that the order in which experts are handed over does not matter
        order = sorted(range(len(experts)), key=lambda i: (-alone[i], experts[i].task))
        chosen = [experts[order[0]]]
        best, merged = alone[order[0]], soup(chosen)[0]
        tried: list[list[Any]] = []
        for index in order[1:]:
            candidate, score = soup([*chosen, experts[index]])
            tried.append([experts[index].task, score])
            if score >= best:
                chosen.append(experts[index])
                best, merged = score, candidate
        info = {
            **self.facts(),
            "ingredients": [expert.task for expert in chosen],
            "scores_alone": [[experts[i].task, alone[i]] for i in order],
            "scores_added": tried,
        }
        return Merged(merged.shared, info=info)
