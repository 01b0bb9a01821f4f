"""DiT: a class of a fixed list to an image. A prompt is one of the model's own labels, or its number."""

from __future__ import annotations

import torch
from torch import Tensor

from mergesec.contracts import ContractError
from mergesec.errors import nearest
from mergesec.files import brief
from mergesec.modelfiles import read_json
from mergesec_tasks.diffusers._backbone import Ddim, Told, texts_of
from mergesec_tasks.diffusers._folders import INDEX

CARD = {
    "extends": "_pipeline",
    "name": "diffusers-dit",
    "class": "Dit",
    "title": "DiT (diffusers)",
    "paper": "Peebles and Xie, Scalable diffusion models with transformers, ICCV 2023",
    "url": "https://arxiv.org/abs/2212.09748",
    "summary": "the transformer of a DiTPipeline; prompts are its labels, the autoencoder stays frozen",
    "depends": ["diffusers"],
    "requires": {"diffusers": "mergesec[diffusion]"},
    "parameters": {"guidance": {"default": 4.0, "doc": "1 asks the class alone"}},
}


class Dit(Ddim):
    """The backbone of the card above."""

    who = "diffusers-dit"

    def __init__(self, path: str = "", steps: int = 50, guidance: float = 4.0) -> None:
        super().__init__(path, steps, guidance)
        self._labels: dict[str, int] | None = None

    @property
    def labels(self) -> dict[str, int]:
        """Names of classes (each of a label's synonyms) to their numbers; nothing if the folder names none."""
        if self._labels is None:
            told = read_json(self.path / INDEX, self.who).get("id2label")
            named = told if isinstance(told, dict) else {}
            self._labels = {
                word.strip(): int(number)
                for number, label in named.items()
                if str(number).isdecimal() and isinstance(label, str)
                for word in label.split(",")
            }
        return self._labels

    def asked(self, conditions: Tensor) -> Told:
        numbers = [self._number(text) for text in texts_of(conditions)]
        return {"class_labels": torch.tensor(numbers, device=conditions.device)}

    def _number(self, text: str) -> int:
        count = int(self.told["num_embeds_ada_norm"])
        if not text:
            return count  # the row of no class
        number = int(text) if text.isdecimal() else self.labels.get(text, -1)
        if not 0 <= number < count:
            known = list(self.labels) or [f"a number below {count}"]
            raise ContractError(
                f"{self.who}: the prompt {brief(text)!r} names no class{nearest(text, known)}"
            )
        return number

    def _check_side(self, latents: int, pixels: int) -> None:
        own = int(self.told["sample_size"])
        if latents != own:
            raise ContractError(
                f"{self.who}: images of {pixels} pixels; its positions are for {pixels * own // latents}"
            )
