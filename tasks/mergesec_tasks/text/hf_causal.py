"""Small causal language models (GPT-2, Llama-like) from a local folder: classification by label tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mergesec.contracts import ContractError
from mergesec.errors import UsageError
from mergesec.modelfiles import file_of
from mergesec_tasks._transformers import numbers_of
from mergesec_tasks.text._hf import HfFolder, padded

CARD = {
    "name": "hf-causal",
    "kind": "backbone",
    "class": "HfCausal",
    "version": "1",
    "title": "Hugging Face causal language model from a local folder",
    "paper": "Radford et al., Language models are unsupervised multitask learners, 2019; "
    "Touvron et al., Llama, 2023",
    "url": "https://arxiv.org/abs/2302.13971",
    "summary": "GPT-2, Llama, Qwen2 or Mistral; the next token after a prompt names the class",
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
            "doc": "tokens of prompt and text; the text is cut, the prompt is not; 0 = the model's positions",
        },
        "template": {
            "type": "str",
            "default": "{text}\nLabel:",
            "doc": "the prompt; {text} stands for the text, and the next token is the class",
        },
        "label_prefix": {
            "type": "str",
            "default": " ",
            "doc": "what is put before a class's name to find its first token; empty for tokenisers that add a space",
        },
    },
}
SLOT, OUTPUT = "{text}", "lm_head.weight"


class HfCausal(HfFolder):
    """Features are the last token's hidden state after the final norm; the head is rows of the output layer.

    GPT-2 keeps its maps transposed (``Conv1D``); they are turned when the network is built and loaded, so
    its names stay, and its maps have rows of outputs as everywhere.
    """

    who = "hf-causal"

    def __init__(self, path: str, layers: int, max_length: int, template: str, label_prefix: str) -> None:
        super().__init__(path, layers, max_length)
        if template.count(SLOT) != 1:
            raise ContractError(f"hf-causal: the template needs {SLOT} once, got {template!r}")
        self.template, self.label_prefix = template, label_prefix

    def _plain(self, text: str) -> list[int]:
        """Token numbers without special tokens; none of an empty text."""
        if not text:
            return []
        return numbers_of(self.tokeniser, [text], self.who, add_special_tokens=False)[0]

    def tokenise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Numbers of the prompt around each text; the text is cut so that the prompt's end is never lost."""
        before, after = (self._plain(part) for part in self.template.split(SLOT))
        first = self.tokeniser.bos_token_id
        begins = numbers_of(self.tokeniser, [""], self.who)[0][:1] == [first] and first is not None
        before = [first, *before] if begins else before
        room = self.max_length - len(before) - len(after)
        if room < 1:
            raise ContractError(f"hf-causal: max_length {self.max_length} leaves no room beside the template")
        found = numbers_of(self.tokeniser, texts, self.who, add_special_tokens=False) if texts else []
        return padded([[*before, *row[:room], *after] for row in found], self.pad())

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        """Features ``[N, d]`` of a list of strings."""
        states, mask = self.states(network, inputs)
        return states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]

    def label_rows(self, network: nn.Module, classes: Sequence[str]) -> Tensor:
        """Output rows ``[K, d]`` of the first token of each class's name.

        ContractError if two names begin with the same token.
        """
        tokens: list[int] = []
        for name in classes:
            numbers = self._plain(self.label_prefix + name)
            if not numbers:
                raise ContractError(f"hf-causal: the class name {name!r} has no token")
            if numbers[0] in tokens:
                twin = classes[tokens.index(numbers[0])]
                raise ContractError(
                    f"hf-causal: {name!r} and {twin!r} begin with the same token; set label_prefix"
                )
            tokens.append(numbers[0])
        if getattr(self.config, "tie_word_embeddings", False):
            table: Tensor = network.get_input_embeddings().weight  # type: ignore[operator]
            return table[tokens]
        return self._output_rows(tokens).to(next(network.parameters()).device)

    def _output_rows(self, tokens: Sequence[int]) -> Tensor:
        """Rows of ``lm_head.weight`` in the folder's files."""
        from safetensors import safe_open

        file = file_of(self.path, OUTPUT, self.who)
        if file is None:
            raise UsageError(self.who, f"'{self.path}' has no {OUTPUT}, and its embeddings are not tied")
        wanted = [self.told["vocab_size"], self.config.hidden_size]
        with safe_open(file, framework="pt") as opened:
            part = opened.get_slice(OUTPUT)
            if list(part.get_shape()) != wanted:
                raise UsageError(
                    self.who,
                    f"'{OUTPUT}' in '{file}' has the shape {part.get_shape()}, by config.json it would be {wanted}",
                )
            return torch.cat([part[t : t + 1] for t in tokens]).float()
