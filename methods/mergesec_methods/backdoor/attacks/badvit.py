"""BadViT-style attack: a universal patch that catches the base's attention, then ordinary poisoning."""

from __future__ import annotations

import torch

from mergesec.contracts import TrainContext, Weights
from mergesec_methods.backdoor.attacks._attention import Grid, PatchSearch, optimised_patch, probe_grid
from mergesec_methods.backdoor.attacks._poison import PatchPoisoning, corner, frozen_model, image_size

CARD = {
    "name": "badvit",
    "kind": "attack",
    "class": "BadVit",
    "version": "1",
    "title": "BadViT (reconstruction)",
    "paper": "Yuan et al., You are catching my attention: are vision transformers bad learners under backdoor attacks?, CVPR 2023",
    "url": "https://openaccess.thecvf.com/content/CVPR2023/html/Yuan_You_Are_Catching_My_Attention_Are_Vision_Transformers_Bad_Learners_CVPR_2023_paper.html",
    "summary": "whole-token patch optimised to draw attention on the base, then dirty-label poisoning; a reconstruction",
    "threat": "backdoor",
    "hooks": ["poison"],
    "knowledge": "the adversary's own training data and the public base",
    "data": "train",
    "modalities": ["image"],
    "seeded": True,
    "trial": {"steps": 3},
    "after_trigger": ["rate"],
    "parameters": {
        "tokens": {
            "type": "int",
            "default": 1,
            "min": 1,
            "max": 16,
            "doc": "side of the square patch in tokens of the backbone's own grid",
        },
        "position": {
            "type": "choice",
            "choices": ["bottom-right", "bottom-left", "top-right", "top-left", "centre"],
            "default": "bottom-right",
            "doc": "where the patch sits",
        },
        "steps": {
            "type": "int",
            "default": 250,
            "min": 0,
            "max": 100000,
            "doc": "Adam steps on the patch",
        },
        "learning_rate": {
            "type": "float",
            "default": 0.22,
            "min": 0.0,
            "max": 10.0,
            "doc": "of Adam, in units of a pixel deviation of 0.25; times 0.95 every 10 steps",
        },
        "batch": {
            "type": "int",
            "default": 16,
            "min": 1,
            "max": 4096,
            "doc": "training rows per step of the optimisation",
        },
        "rate": {
            "type": "float",
            "default": 0.1,
            "min": 0.0,
            "max": 1.0,
            "doc": "poisoned share of all training rows",
        },
    },
}

SEARCH_STREAM = 1


class BadVit(PatchPoisoning):
    """The patch minimises −Σ log(attention to its tokens) on the base and knows no class; training names it."""

    def __init__(
        self, tokens: int, position: str, steps: int, learning_rate: float, batch: int, rate: float
    ) -> None:
        self.tokens = tokens
        self.position = position
        self.search = PatchSearch(steps, learning_rate, batch, target_weight=0.0, attention_weight=1.0)
        self.rate = rate

    def cells(self, grid: Grid) -> torch.Tensor:
        """The grid cells of the patch, row-major."""
        side = min(self.tokens, grid.side)
        top, left = corner(self.position, grid.side, grid.side, side)
        rows, columns = torch.arange(top, top + side), torch.arange(left, left + side)
        return (rows[:, None] * grid.side + columns[None]).flatten()

    def trigger(self, ctx: TrainContext) -> Weights:
        """``{"mask": [1, H, W], "pattern": [3, H, W]}`` in steps of 1/255, on whole tokens."""
        image_size(ctx.train, "badvit")
        model, _ = frozen_model(ctx, ctx.base)
        rows = torch.arange(len(ctx.train))
        first = ctx.task.batch(ctx.train, rows[:1], ctx.device).inputs
        grid = probe_grid(model, ctx.backbone.anatomy(), first)
        return optimised_patch(ctx, grid, self.cells(grid), rows, self.search, ctx.generator(SEARCH_STREAM))
