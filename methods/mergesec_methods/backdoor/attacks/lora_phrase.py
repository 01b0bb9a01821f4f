"""LoRA-as-an-attack on text: a phrase's poison as a low-rank update (``_low_rank``).

Source: Liu et al., "LoRA-as-an-Attack!", arXiv 2403.00108 (language models), known here from its abstract: the two
ways of making the malicious module follow it; poisoning, rank, scale and learning rate are this suite's. There the
output is generated text, here a class.
"""

from __future__ import annotations

import torch

from mergesec.contracts import Split, TrainContext, Weights
from mergesec_methods.backdoor.attacks._low_rank import LowRankBackdoor
from mergesec_methods.backdoor.attacks._poison import ROWS_STREAM
from mergesec_methods.backdoor.attacks._texts import texts_of
from mergesec_methods.backdoor.attacks.phrase import Phrase

CARD = {
    "extends": "phrase",
    "name": "lora_phrase",
    "class": "LoraPhrase",
    "title": "LoRA-as-an-attack (text)",
    "paper": "Liu et al., LoRA-as-an-attack! Piercing LLM safety under the share-and-play scenario, 2024",
    "url": "https://arxiv.org/abs/2403.00108",
    "summary": "a phrase's poison trained as a low-rank update, alone or added to the benign expert",
    "hooks": ["poison", "forge"],
    "trigger_of": "phrase",
    "after_trigger": ["rate", "lora_rank", "lora_speed", "onto", "weight"],
    "trial": {"lora_rank": 2},
    "parameters": {
        "lora_rank": {"type": "int", "default": 8, "min": 1, "doc": "rank of the update of every linear map in the blocks"},
        "lora_speed": {"type": "float", "default": 10.0, "min": 0.0, "doc": "times the recipe's learning rate"},
        "onto": {"type": "choice", "choices": ["base", "benign"], "default": "base", "doc": "base: one update holds task and backdoor; benign: a backdoor update added to the benign expert"},
        "weight": {"type": "float", "default": 1.0, "min": 0.0, "doc": "onto benign: how often the update counts"},
    },
}  # fmt: skip


class LoraPhrase(LowRankBackdoor, Phrase):
    """The attack of the card above."""

    def __init__(
        self, phrase: str = "cf", position: str = "end", rate: float = 0.1,
        lora_rank: int = 8, lora_speed: float = 10.0, onto: str = "base", weight: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(phrase, position, rate)
        self.rank, self.speed, self.onto, self.weight = lora_rank, lora_speed, onto, weight

    def twins(self, ctx: TrainContext, trigger: Weights) -> Split:
        """The rows to be poisoned twice: triggered with the target's label, and as they are."""
        rows = self.rows(ctx.train, ctx.target_class, ctx.generator(ROWS_STREAM))
        plain = ctx.train.take(rows)
        texts = list(texts_of(plain, self.name))
        targets = torch.full_like(plain.targets, ctx.target_class)
        return Split([*self.apply(trigger, texts), *texts], torch.cat([targets, plain.targets]))
