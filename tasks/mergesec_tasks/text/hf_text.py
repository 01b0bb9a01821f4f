"""Text encoders of the Hugging Face library (BERT, RoBERTa, MiniLM, DistilBERT) from a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mergesec_tasks._transformers import numbers_of
from mergesec_tasks._words import check_between, tokens_around
from mergesec_tasks.text._hf import HfFolder, padded

CARD = {
    "name": "hf-text",
    "kind": "backbone",
    "class": "HfText",
    "version": "1",
    "title": "Hugging Face text encoder from a local folder",
    "paper": "Devlin et al., BERT, NAACL 2019; Liu et al., RoBERTa, 2019; Wang et al., MiniLM, NeurIPS 2020",
    "url": "https://arxiv.org/abs/1810.04805",
    "summary": "BERT, RoBERTa, MiniLM or DistilBERT from a local folder or the hub at a commit",
    "modalities": ["text"],
    "depends": ["transformers"],
    "inspect": "mergesec_tasks._modelfolders:inspect",
    "requires": {"transformers": "transformers>=4.57"},
    "source": "a local folder in the Hugging Face layout, or the hub at a commit",
    "licence": "that of the weights",
    "recipe": {
        "optimizer": "adamw",
        "learning_rate": 2e-5,
        "weight_decay": 0.01,
        "epochs": 3,
        "batch_size": 32,
        "schedule": "cosine",
    },
    "parameters": {
        "path": {
            "type": "model",
            "default": "",
            "doc": "folder with config.json, safetensors and tokenizer.json, or owner/name@commit of the hub",
        },
        "layers": {
            "type": "int",
            "default": 0,
            "min": 0,
            "max": 1000,
            "doc": "how many transformer blocks are kept, from the input on; 0 = all",
        },
        "max_length": {
            "type": "int",
            "default": 128,
            "min": 0,
            "max": 100000,
            "doc": "tokens read of a text, special ones included; 0 = as many as the model has positions",
        },
        "pooling": {
            "type": "choice",
            "choices": ["mean", "cls"],
            "default": "mean",
            "doc": "features: mean of the tokens, or the first token",
        },
    },
}


class HfText(HfFolder):
    """Features are the mean of the last hidden states over the text's tokens, or the first token's."""

    who = "hf-text"

    def __init__(self, path: str, layers: int, max_length: int, pooling: str) -> None:
        super().__init__(path, layers, max_length)
        self.pooling = pooling

    @property
    def tokeniser(self) -> Any:
        if self._words is None:
            check_between(self.max_length, tokens_around(self.path, self.who), self.who)
        return super().tokeniser

    def tokenise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Numbers as the folder's tokeniser gives them, special tokens included, cut at ``max_length``."""
        rows = numbers_of(self.tokeniser, texts, self.who, truncation=True, max_length=self.max_length)
        return padded(rows, self.pad())

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        """Features ``[N, d]`` of a list of strings."""
        states, mask = self.states(network, inputs)
        if self.pooling == "cls":
            return states[:, 0]
        share = mask.to(states.dtype) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return (states * share[..., None]).sum(dim=1)
