"""What the Hugging Face text backbones share: a folder (or hub model) with config, safetensors and tokeniser.

Nothing is unpickled here, and no code of the folder is run.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mergesec.anatomy import Anatomy, describe
from mergesec.contracts import Weights
from mergesec.errors import UsageError
from mergesec.modelfiles import shown
from mergesec.text import TextBackbone
from mergesec_tasks._adapters import expert_weights
from mergesec_tasks._configs import Values, layers_name, layers_of
from mergesec_tasks._hub import model_folder
from mergesec_tasks._modelfolders import KINDS, check_base, check_expert
from mergesec_tasks._transformers import built, config_of, filled, hollow, loaded, shapes_of, tokenizer_of
from mergesec_tasks._words import check_beginning, check_many_words, check_words

OPTIONAL = ("pooler.", "position_ids", "rotary_emb.inv_freq")
"""Tensors that a checkpoint may lack, since features do not pass through them or they are computed."""


def straightened(network: nn.Module) -> nn.Module:
    """GPT-2's ``Conv1D`` maps (weight in × out) replaced by ``nn.Linear`` (out × in), in place.

    The function stays the same, and every map then has its outputs in rows, as the anatomy needs it.
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Conv1D":
                weight, bias = cast(Tensor, child.weight), cast(Tensor, child.bias)
                inputs, outputs = weight.shape
                linear = nn.Linear(inputs, outputs, device=weight.device, dtype=weight.dtype)
                with torch.no_grad():
                    linear.weight.copy_(weight.T)
                    linear.bias.copy_(bias)
                setattr(parent, name, linear)
    return network


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token numbers int64 ``[N, T]``, filled up on the right with ``pad``, and the mask bool ``[N, T]``."""
    longest = max((len(row) for row in rows), default=0)
    numbers = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        numbers[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, : len(row)] = True
    return numbers, mask


class HfFolder(TextBackbone):
    """A transformer without its output layer, from a folder in the Hugging Face layout.

    float16 or bfloat16 on disk becomes float32. ``layers`` blocks are kept, from the input on (0 = all);
    at most ``max_length`` tokens are read (0 = as many as the model has positions).
    """

    who: ClassVar[str]

    def __init__(self, path: str, layers: int, max_length: int) -> None:
        self.source = path
        self.layers, self._asked = layers, max_length
        self._folder: Path | None = None
        self._told: Values | None = None
        self._settings: Any = None
        self._words: Any = None
        self._template: nn.Module | None = None

    # ---- configuration

    @property
    def path(self) -> Path:
        """The folder of the model; the hub's is fetched once."""
        if self._folder is None:
            if not self.source:
                raise UsageError(
                    self.who,
                    "no model; set the parameter 'path' to a folder with config.json, model.safetensors and "
                    "tokenizer.json",
                )
            self._folder = model_folder(self.source, self.who)
        return self._folder

    @property
    def told(self) -> Values:
        """The checked config of the folder, as it stands there."""
        if self._told is None:
            self._told = check_base(self.path, self.who, KINDS[self.who])
        return self._told

    @property
    def config(self) -> Any:
        """The config of the network as run, with ``layers`` applied."""
        if self._settings is None:
            own = layers_of(self.told)
            if self.layers > own:
                raise UsageError(self.who, f"layers {self.layers} exceed the {own} of the model")
            kept = {layers_name(self.told): self.layers or own}
            self._settings = config_of({**self.told, **kept}, self.who)
            self._settings.use_cache = False  # nobody goes on with a text that was read
        return self._settings

    @property
    def max_length(self) -> int:
        """Tokens read of a text."""
        positions = int(getattr(self.config, "max_position_embeddings", 0) or 512)
        if self.config.model_type in ("roberta", "xlm-roberta"):
            positions -= int(self.config.pad_token_id) + 1  # its positions begin after the padding's number
        if positions < 1 or self._asked > positions:
            raise UsageError(
                self.who, f"max_length {self._asked} exceeds the {positions} positions of the model"
            )
        return self._asked or positions

    @property
    def tokeniser(self) -> Any:
        if self._words is None:
            words = check_words(self.path, self.told["vocab_size"], self.who)
            check_many_words(self.path, words, self.told["vocab_size"], self.who)
            check_beginning(self.path, self.who)
            self._words = tokenizer_of(self.path, self.told["vocab_size"], self.who)
        return self._words

    def pad(self) -> int:
        """The number that padded places hold; they are masked."""
        for source in (self.tokeniser, self.config):
            if getattr(source, "pad_token_id", None) is not None:
                return int(source.pad_token_id)
        return 0

    # ---- network

    def build(self) -> nn.Module:
        """A fresh network with fused attention; its weights mean nothing until loaded."""
        if self._template is None:
            self._template = hollow(straightened(built(self.config, self.who)))
        return filled(self._template)

    def base_weights(self) -> Weights:
        """The folder's weights, float32. Only safetensors is read; ContractError if tensors are missing."""
        return self._weights_in(self.path)

    def published(self, source: str) -> Weights:
        """A published expert in the Hugging Face layout, or a LoRA adapter of peft: a folder, or the hub at a commit."""
        found = expert_weights(source, self.who, self._whole, self._expert_in)
        return {name: found[name] for name in self.build().state_dict()}

    def _whole(self) -> Weights:
        """The base with all its blocks: an adapter may have factors for those that are not kept."""
        if not self.layers:
            return self.base_weights()
        twin = copy.copy(self)
        twin.layers, twin._settings, twin._template = 0, None, None
        return twin.base_weights()

    def _expert_in(self, folder: Path) -> Weights:
        check_expert(folder, self.path, self.told, self.who, KINDS[self.who])
        return self._weights_in(folder)

    def _weights_in(self, folder: Path) -> Weights:
        read = loaded(folder, copy.deepcopy(self.config), self.who, OPTIONAL)
        native = straightened(read).state_dict()
        weights: dict[str, Tensor] = {}
        for name, target in self.build().state_dict().items():
            if native[name].shape != target.shape:
                raise UsageError(
                    self.who,
                    f"'{name}' in '{folder}' has shape {list(native[name].shape)}, config.json needs "
                    f"{list(target.shape)}",
                )
            weights[name] = native.pop(name).clone()
        return weights

    def anatomy(self) -> Anatomy:
        """Blocks and heads of the network as run."""
        return describe(shapes_of(self.build()), self.config.num_attention_heads, "rope_theta" in self.told)

    def embedding(self) -> str:
        network = self.build()
        words = network.get_input_embeddings()  # type: ignore[operator]
        return next(f"{name}.weight" for name, module in network.named_modules() if module is words)

    def states(self, network: nn.Module, inputs: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Hidden states after the last block and norm ``[N, T, d]``, and the mask ``[N, T]``."""
        device = next(network.parameters()).device
        numbers, mask = self.tokenise(inputs)
        if not bool(mask.any(dim=1).all()):  # features would be those of padding
            empty = inputs[int(mask.any(dim=1).logical_not().nonzero()[0])]
            raise UsageError(
                self.who, f"the text {shown(empty)} has no token, and no prompt stands around it"
            )
        numbers, mask = numbers.to(device), mask.to(device)
        output = network(input_ids=numbers, attention_mask=mask.long())
        return output.last_hidden_state, mask
