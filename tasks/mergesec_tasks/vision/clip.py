"""CLIP through transformers: the vision tower is what is fine-tuned and merged, all else stays frozen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesec.contracts import Weights
from mergesec.errors import UsageError
from mergesec_tasks._cliptext import SCALE, TEXT_PROJECTION, VISUAL_PROJECTION, check_text_tower, check_whole
from mergesec_tasks._hub import model_folder
from mergesec_tasks._transformers import (
    clip_tokenizer,
    config_of,
    fitting_numbers,
    numbers_of,
    text_tower,
)
from mergesec_tasks.vision.hf_vit import HfVit

CARD = {
    "name": "clip",
    "kind": "backbone",
    "class": "Clip",
    "version": "1",
    "title": "CLIP (transformers)",
    "paper": "Radford et al., Learning transferable visual models from natural language supervision, ICML 2021",
    "url": "https://arxiv.org/abs/2103.00020",
    "summary": "CLIP's vision tower with zero-shot heads from its text tower; ViT-B/32, B/16, L/14 or any other",
    "modalities": ["image"],
    "depends": ["transformers"],
    "inspect": "mergesec_tasks._modelfolders:inspect",
    "inspect_tasks": "mergesec_tasks._cliptext:inspect_prompts",
    "requires": {"transformers": "mergesec[real]"},
    "zero_shot": True,
    "pretrain": "mergesec_tasks.mini_clip.pretrain:pretrain",
    "source": "a local folder in the Hugging Face layout, or the hub at a commit; bench pretrain makes the small one",
    "licence": "that of the weights (openai's: MIT)",
    "recipe": {
        "optimizer": "adamw",
        "learning_rate": 1e-5,
        "weight_decay": 0.1,
        "schedule": "cosine",
        "epochs": 1,
        "steps": 4000,
        "batch_size": 128,
    },
    "parameters": {
        "model": {
            "type": "model",
            "default": "openai/clip-vit-base-patch32@c237dc49a33fc61debc9276459120b7eac67e7ef",
            "doc": "folder with config.json, safetensors and tokenizer files, or owner/name@commit of the hub",
        },
        "resolution": {
            "type": "int",
            "default": 0,
            "min": 0,
            "max": 4096,
            "doc": "image side the network runs at, a multiple of its patch size; 0 = the model's own",
        },
        "layers": {
            "type": "int",
            "default": 0,
            "min": 0,
            "max": 1000,
            "doc": "how many transformer blocks are kept, from the input on; 0 = all",
        },
        "head": {
            "type": "choice",
            "default": "zero-shot",
            "choices": ["zero-shot", "probe"],
            "doc": "frozen head: from the text tower and the task's prompts, or a linear probe on the base",
        },
    },
}

TEXT_BATCH = 256


def text_head(embeddings: Sequence[Tensor], scale: Tensor) -> Weights:
    """A zero-shot head: per class the mean of its unit-length sentence embeddings ``[S, d]``, unit length.

    Radford et al., section 3.1.4: the ensemble is built in embedding space. ``scale`` multiplies the logits.
    """
    rows = [functional.normalize(functional.normalize(e, dim=-1).mean(0), dim=-1) for e in embeddings]
    return {"weight": torch.stack(rows).float(), "scale": scale.detach().float().reshape(())}


class Clip(HfVit):
    """Features are CLIP's image embeddings: the vision tower's, through the base's frozen projection."""

    who, parameter = "clip", "model"
    interpolation = "bicubic"  # as CLIP's own preprocessing

    def __init__(self, model: str, resolution: int, layers: int, head: str) -> None:
        super().__init__(model, resolution, layers)
        self.head_kind = head
        self._folder: Path | None = None
        self._frozen: dict[str, Tensor] = {}

    @property
    def path(self) -> Path:
        if self._folder is None:
            self._folder = model_folder(self.source, "clip")
        return self._folder

    def frozen(self) -> dict[str, Tensor]:
        """The projections ``[d, hidden]`` of both towers and the logarithm of the logit scale, float32."""
        if not self._frozen:
            from safetensors import safe_open

            found: dict[str, Tensor] = {}
            for name, stored in check_whole(self.path, self.told["hidden_size"], self.who).items():
                with safe_open(stored.file, framework="pt") as tensors:
                    found[name] = tensors.get_tensor(name).float()
                if not bool(found[name].isfinite().all()):  # of what is NaN the first class is the likeliest
                    raise UsageError(self.who, f"'{name}' in '{self.path}' holds values that are not finite")
            self._frozen = found
        return self._frozen

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        """Image embeddings ``[N, d]`` of images float32 in [0, 1] ``[N, 3, H, W]``."""
        pooled = super().features(network, inputs)
        projection = self.frozen()[VISUAL_PROJECTION]
        if projection.device != pooled.device:
            projection = self._frozen[VISUAL_PROJECTION] = projection.to(pooled.device)
        return functional.linear(pooled, projection.to(pooled.dtype))

    def zero_shot(self, prompts: Sequence[Sequence[str]], device: torch.device) -> Weights | None:
        """The head from ``prompts``, by the folder's text tower and tokenizer; None for ``head: probe``."""
        if self.head_kind == "probe":
            return None
        tokenizer, tower = self._text_tower()
        tower.to(device).eval()
        projection = self.frozen()[TEXT_PROJECTION].to(device)
        sentences = [sentence for texts in prompts for sentence in texts]
        most = tower.config.max_position_embeddings
        numbers = fitting_numbers(
            lambda texts: numbers_of(tokenizer, texts, self.who), sentences, most, self.who
        )
        rows = []
        with torch.no_grad():
            for start in range(0, len(sentences), TEXT_BATCH):
                part = {"input_ids": numbers[start : start + TEXT_BATCH]}
                batch = tokenizer.pad(part, return_tensors="pt").to(device)
                pooled = tower(batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
                rows.append(functional.linear(pooled, projection))
        embeddings = torch.split(torch.cat(rows), [len(texts) for texts in prompts])
        return text_head(embeddings, self.frozen()[SCALE].exp())

    def _text_tower(self) -> tuple[Any, Any]:
        """The folder's tokenizer and text tower. UsageError if tensors are missing."""
        values = check_text_tower(self.path, self.who)
        tokenizer = clip_tokenizer(self.path, values["vocab_size"], self.who)
        return tokenizer, text_tower(self.path, config_of(values, self.who), self.who)
