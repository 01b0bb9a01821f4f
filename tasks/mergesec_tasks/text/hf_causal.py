"""Small causal language models (GPT-2, Llama-like) from a local folder: classification by label tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesec.adapterconfig import is_adapter
from mergesec.contracts import Weights
from mergesec.errors import UsageError
from mergesec.modelfiles import file_of, stored_tensors
from mergesec_tasks._adapterfit import FROZEN, check_frozen_output
from mergesec_tasks._hub import model_folder
from mergesec_tasks._transformers import numbers_of
from mergesec_tasks._words import unknown_word
from mergesec_tasks.text._hf import HfFolder, padded
from mergesec_tasks.text._prompts import (
    OUTPUT,
    SLOT,
    WHOLE,
    check_answers,
    check_labels,
    check_output,
    check_room,
    check_template,
)

CARD = {
    "name": "hf-causal",
    "kind": "backbone",
    "class": "HfCausal",
    "version": "2",
    "title": "Hugging Face causal language model from a local folder",
    "paper": "Radford et al., Language models are unsupervised multitask learners, 2019; "
    "Touvron et al., Llama, 2023",
    "url": "https://arxiv.org/abs/2302.13971",
    "summary": "GPT-2, Llama, Qwen2 or Mistral; the next token after a prompt names the class",
    "modalities": ["text", "answers"],
    "depends": ["transformers"],
    "inspect": "mergesec_tasks._modelfolders:inspect",
    "inspect_tasks": "mergesec_tasks.text._prompts:inspect",
    "inspect_answers": "mergesec_tasks.text._prompts:inspect_answers",
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
        "labels": {
            "type": "choice",
            "choices": ["whole", "first"],
            "default": "whole",
            "later": True,
            "doc": "whole: a class's name has to be one token; first: of a longer one the first counts",
        },
        "perplexity_rows": {
            "type": "int",
            "default": 0,
            "min": 0,
            "max": 1000000,
            "later": True,
            "doc": "test texts of every task whose perplexity is measured beside accuracy, without the prompt; 0 = none",
        },
    },
}
LOSS_ROWS, LOSS_TOKENS = 32, 256
"""Texts, and tokens of them, that are scored at a time."""


class HfCausal(HfFolder):
    """Features are the last token's hidden state after the final norm; the head is rows of the output layer.

    GPT-2 keeps its maps transposed (``Conv1D``); they are turned when the network is built and loaded, so
    its names stay, and its maps have rows of outputs as everywhere.
    """

    who = "hf-causal"

    def __init__(
        self, path: str, layers: int, max_length: int, template: str, label_prefix: str, labels: str = WHOLE,
        perplexity_rows: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(path, layers, max_length)
        check_template(template, f"{self.who}.template")
        self.template, self.label_prefix, self.labels = template, label_prefix, labels
        self.perplexity_rows = perplexity_rows

    def published(self, source: str) -> Weights:
        """As everywhere; UsageError for an expert with an output layer of its own, by which it would not be read."""
        place = model_folder(source, "expert")
        if is_adapter(place, self.who):
            check_frozen_output(place, self.who)
        weights = super().published(source)
        if not is_adapter(place, self.who):
            self._check_output_of(place)
        return weights

    def _check_output_of(self, place: Path) -> None:
        """UsageError if an expert's folder holds another output layer than the base's; rounded to fewer digits it is
        the same."""
        tied = getattr(
            self.config, "tie_word_embeddings", False
        )  # by the base's config and so by the expert's
        if tied or OUTPUT not in stored_tensors(place, self.who):
            return
        if not _alike(self._stored_rows(None), rows_in(place, None, self.who)):
            raise UsageError(self.who, f"'{OUTPUT}' in '{place}' is not that of the base; {FROZEN}")

    def _begin(self) -> list[int]:
        """What the tokeniser puts before every text."""
        first = self.tokeniser.bos_token_id
        begins = numbers_of(self.tokeniser, [""], self.who)[0][:1] == [first] and first is not None
        return [first] if begins else []

    def _plain(self, text: str) -> list[int]:
        """Token numbers without special tokens; none of an empty text."""
        if not text:
            return []
        return numbers_of(self.tokeniser, [text], self.who, add_special_tokens=False)[0]

    def tokenise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Numbers of the prompt around each text; the text is cut so that the prompt's end is never lost."""
        before, after = (self._plain(part) for part in self.template.split(SLOT))
        before = [*self._begin(), *before]
        check_room(len(before) + len(after), self.max_length, self.max_length, self.who)
        room = self.max_length - len(before) - len(after)
        found = numbers_of(self.tokeniser, texts, self.who, add_special_tokens=False) if texts else []
        return padded([[*before, *row[:room], *after] for row in found], self.pad())

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        """Features ``[N, d]`` of a list of strings."""
        states, mask = self.states(network, inputs)
        return states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]

    def label_rows(self, network: nn.Module, classes: Sequence[str]) -> Tensor:
        """Output rows ``[K, d]`` of each class's name.

        UsageError if names begin with the same token, or (``labels: whole``) one is more than a token.
        """
        numbers = {name: self._plain(self.label_prefix + name) for name in classes}
        shown = {name: self.tokeniser.convert_ids_to_tokens(found) for name, found in numbers.items()}
        unknown = unknown_word(self.path, self.who)
        check_labels(shown, self.label_prefix, self.labels, f"{self.who}.label_prefix", unknown)
        tokens = [found[0] for found in numbers.values()]
        return self._output_rows(network, tokens)

    def token_losses(self, network: nn.Module, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Per text ``[N]`` the sum of −ln p of its tokens but the first (which is the tokeniser's own where it puts one
        before every text), and their number. Texts are cut at ``max_length``. Where embeddings are tied, the output
        layer is the network's own, else the base's."""
        device = next(network.parameters()).device
        rows = numbers_of(self.tokeniser, texts, self.who, add_special_tokens=False) if texts else []
        begun = [[*self._begin(), *row][: self.max_length] for row in rows]
        table = self._output_rows(network, None)
        found = []
        for start in range(0, len(begun), LOSS_ROWS):
            numbers, mask = padded(begun[start : start + LOSS_ROWS], self.pad())
            numbers, mask = numbers.to(device), mask.to(device)
            states = network(input_ids=numbers, attention_mask=mask.long()).last_hidden_state
            losses = torch.zeros(mask[:, 1:].shape, device=device)
            losses[mask[:, 1:]] = _losses(states[:, :-1][mask[:, 1:]], table, numbers[:, 1:][mask[:, 1:]])
            found.append(losses.sum(dim=1))
        counts = torch.tensor([max(0, len(row) - 1) for row in begun])
        return torch.cat(found) if found else torch.zeros(0), counts

    def answered(
        self, network: nn.Module, prompts: Sequence[str], answers: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Mean −ln p of each answer's tokens ``[N]``, and whether each of them is the likeliest. Nothing is cut:
        UsageError for a row that is longer than ``max_length``."""
        device = next(network.parameters()).device
        first = [
            [*self._begin(), *row]
            for row in numbers_of(self.tokeniser, prompts, self.who, add_special_tokens=False)
        ]
        then = numbers_of(self.tokeniser, answers, self.who, add_special_tokens=False)
        longest = max(len(a) + len(b) for a, b in zip(first, then, strict=True))
        check_answers(longest, self.max_length, f"{self.who}.max_length")
        numbers, mask = padded([a + b for a, b in zip(first, then, strict=True)], self.pad())
        begins = torch.tensor([len(row) for row in first])[:, None]
        asked = (mask & (torch.arange(mask.shape[1]) >= begins))[:, 1:].to(device)
        numbers, mask = numbers.to(device), mask.to(device)
        states = network(input_ids=numbers, attention_mask=mask.long()).last_hidden_state
        scored = _scored(states[:, :-1][asked], self._output_rows(network, None), numbers[:, 1:][asked])
        losses = torch.zeros(asked.shape, device=device).masked_scatter(asked, scored[0])
        missed = torch.zeros_like(asked).masked_scatter(asked, ~scored[1])
        return losses.sum(dim=1) / asked.sum(dim=1).clamp(min=1), ~missed.any(dim=1)

    def _output_rows(self, network: nn.Module, tokens: Sequence[int] | None) -> Tensor:
        """Rows of the output layer, all of them without ``tokens``: the network's embeddings where those are tied,
        else ``lm_head.weight`` in the folder's files."""
        if getattr(self.config, "tie_word_embeddings", False):
            table: Tensor = network.get_input_embeddings().weight  # type: ignore[operator]
            return table if tokens is None else table[tokens]
        return self._stored_rows(tokens).to(next(network.parameters()).device)

    def _stored_rows(self, tokens: Sequence[int] | None) -> Tensor:
        check_output(self.path, self.told, self.who)
        return rows_in(self.path, tokens, self.who)


def rows_in(folder: Path, tokens: Sequence[int] | None, who: str) -> Tensor:
    """Rows of the output layer that a folder stores, float32; all of them without ``tokens``."""
    from safetensors import safe_open

    file = file_of(folder, OUTPUT, who)
    with safe_open(str(file), framework="pt") as opened:
        part = opened.get_slice(OUTPUT)
        rows: Tensor = part[:] if tokens is None else torch.cat([part[t : t + 1] for t in tokens])
    # with NaN no answer would be the likeliest, which would count as a wrong one
    if not bool(rows.isfinite().all()):
        raise UsageError(who, f"'{OUTPUT}' in '{file}' holds values that are not finite")
    return rows.float()


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tables are the same, perhaps stored with fewer digits."""
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    return one.shape == other.shape and any(torch.equal(one.to(kind), other.to(kind)) for kind in kinds)


def _losses(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """−ln p ``[M]`` of tokens ``targets`` after ``states`` ``[M, d]``."""
    return _scored(states, table, targets)[0]


def _scored(states: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """−ln p ``[M]`` of tokens ``targets`` after ``states`` ``[M, d]``, and whether they are the likeliest, bool; some at a
    time, for a vocabulary is wide."""
    losses, first = [states.new_zeros(0)], [targets.new_zeros(0, dtype=torch.bool)]
    for some, wanted in zip(torch.split(states, LOSS_TOKENS), torch.split(targets, LOSS_TOKENS), strict=True):
        logits = some @ table.T
        losses.append(functional.cross_entropy(logits, wanted, reduction="none"))
        first.append(logits.argmax(dim=1) == wanted)
    return torch.cat(losses), torch.cat(first)
