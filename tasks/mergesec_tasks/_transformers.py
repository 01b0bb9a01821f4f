"""Networks of the transformers library, built and read from folders; nothing is unpickled, no code of a folder runs."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergesec.compat import ensure_torchvision
from mergesec.errors import UsageError
from mergesec.files import brief
from mergesec.modelfiles import COMPUTED, shown
from mergesec.weights import OUTPUTS
from mergesec_tasks._cliptext import check_context
from mergesec_tasks._configs import settings
from mergesec_tasks._words import TOKENIZER, check_old_words


@contextmanager
def quiet() -> Iterator[None]:
    """transformers silent for a while: what matters in its loading report is checked, not printed."""
    from transformers.utils import logging as module

    logging: Any = module  # in part untyped
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def without_pooler(network: nn.Module) -> nn.Module:
    """``network`` without its pooler, a trained layer for another task, which features do not use."""
    if getattr(network, "pooler", None) is not None:
        network.pooler = None  # type: ignore[assignment]
    return network


def config_of(values: Mapping[str, Any], who: str) -> Any:
    """transformers' config of a checked one (see ``_configs``)."""
    ensure_torchvision()
    from transformers import AutoConfig

    with quiet(), complaining(who, f"transformers makes no config of these values: {dict(values)}"):
        return AutoConfig.for_model(values["model_type"], **settings(dict(values)))


def built(config: Any, who: str) -> nn.Module:
    """A network of this config with fused attention and without pooler; its weights mean nothing."""
    ensure_torchvision()
    from transformers import AutoModel

    with (
        torch.random.fork_rng(devices=[]),  # construction draws initial weights
        complaining(who, f"transformers builds no {config.model_type} of its config"),
    ):
        network = AutoModel.from_config(config, attn_implementation="sdpa")  # type: ignore[no-untyped-call]
    return without_pooler(network)


def hollow(network: nn.Module) -> nn.Module:
    """``network`` with parameters that have shapes and no memory, in place: what ``filled`` makes networks of."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad))
    return network


def filled(template: nn.Module) -> nn.Module:
    """A network like a hollow one, its parameters in fresh memory; they mean nothing until loaded."""
    network = copy.deepcopy(template)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fresh = torch.empty_like(parameter, device="cpu")
            setattr(module, name, nn.Parameter(fresh, parameter.requires_grad))
    return network


@contextmanager
def complaining(who: str, what: str) -> Iterator[None]:
    """What a library says of somebody's files, as one message that names them."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # whatever the library calls it
        reason = brief(f"{type(error).__name__}: {error}", 300)
        raise UsageError(who, f"{brief(what, 400)} ({reason})") from None


BESIDE = OUTPUTS | {
    "classification_head", "distillation_token", "mask_token", "text_model", "vision_model", "text_projection",
    "visual_projection", "logit_scale",
}  # fmt: skip
"""Parts of a checkpoint that features do not pass through."""
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h)\.(\d{1,9})\.")


def _mismatched(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Tensors on disk that have another shape than the network's, and what is told of it: transformers 4 tells names
    alone."""
    return sorted(
        (row, "another shape than by config.json")
        if isinstance(row, str)
        else (row[0], f"the shape {list(row[1])}, by config.json it would be {list(row[2])}")
        for row in report["mismatched_keys"]
    )


def loaded(folder: Path, config: Any, who: str, optional: Sequence[str]) -> nn.Module:
    """The folder's network in float32, without pooler; UsageError, naming the tensor, if any is missing, has another
    shape or would be left out without being a head.

    transformers maps the names on disk to its own (they differ between releases 4 and 5). Tensors whose
    names contain a part of ``optional`` may be missing. Layers beyond the config's are left out.
    """
    from transformers import AutoModel

    with quiet(), complaining(who, f"transformers does not load {str(folder)!r}"):
        network, report = AutoModel.from_pretrained(
            os.fspath(folder), config=config, dtype=torch.float32, local_files_only=True,
            use_safetensors=True, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    for name, shapes in _mismatched(report):
        raise UsageError(who, f"{str(folder)!r}: tensor '{name}' has {shapes}")
    missing = [n for n in sorted(report["missing_keys"]) if not any(part in n for part in optional)]
    if missing:
        raise UsageError(who, f"{str(folder)!r} lacks {len(missing)} tensors, the first is '{missing[0]}'")
    left = [n for n in sorted(report["unexpected_keys"]) if not _beside(n, config.num_hidden_layers)]
    if left:
        raise UsageError(
            who, f"{str(folder)!r}: tensor '{brief(left[0])}' is none of a {config.model_type}, and {len(left) - 1} "
            "others: they would be left out",
        )  # fmt: skip
    return without_pooler(network)


def _beside(name: str, layers: int) -> bool:
    """Whether a network may be read without a tensor."""
    number = _LAYER.search(name)
    beyond = number is not None and int(number[1]) >= layers
    return beyond or bool(COMPUTED.search(name)) or not BESIDE.isdisjoint(name.split("."))


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name to shape, what an anatomy is described from."""
    tensors: dict[str, Tensor] = network.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# --------------------------------------------------------------------------- words


def tokenizer_of(folder: Path, size: int, who: str) -> Any:
    """The tokenizer that a folder's tokenizer.json describes; all its tokens are below ``size``."""
    ensure_torchvision()
    from transformers import PreTrainedTokenizerFast

    # a model's own class may build another tokenizer than the file describes
    return _tokenizer(PreTrainedTokenizerFast, folder, size, who)


def clip_tokenizer(folder: Path, size: int, who: str) -> Any:
    """A CLIP's tokenizer, from tokenizer.json or the older vocab.json and merges.txt; UsageError without either."""
    if not (folder / TOKENIZER).exists():
        check_old_words(folder, size, who)
    ensure_torchvision()
    import transformers

    library: Any = transformers  # the name is resolved when it is asked for
    return _tokenizer(library.CLIPTokenizerFast, folder, size, who)


def _tokenizer(kind: Any, folder: Path, size: int, who: str) -> Any:
    with quiet(), complaining(who, f"the tokenizer in {str(folder)!r} cannot be read"):
        found = kind.from_pretrained(os.fspath(folder), local_files_only=True)
        words: dict[str, int] = found.get_vocab()
    beyond = next((word for word, number in words.items() if number >= size), None)
    if beyond is not None:  # tokenizer_config.json may add some
        raise UsageError(
            who, f"{str(folder)!r}: its tokenizer files give the token {shown(beyond)} the number {words[beyond]}, "
            f"config.json has a vocab_size of {size}",
        )  # fmt: skip
    return found


def numbers_of(tokenizer: Any, texts: Sequence[str], who: str, **how: Any) -> list[list[int]]:
    """The numbers of texts' tokens."""
    with complaining(who, "the folder's tokenizer takes no texts"):
        found: list[list[int]] = tokenizer(list(texts), **how)["input_ids"]
    return found


def fitting_numbers(
    tokenizer: Callable[[Sequence[str]], list[list[int]]], texts: Sequence[str], most: int, who: str
) -> list[list[int]]:
    """The numbers of prompts' tokens; UsageError, naming the prompt, for one that a text tower of ``most`` places would
    read only in part."""
    numbers = tokenizer(texts)
    for text, own in zip(texts, numbers, strict=True):
        check_context(text, len(own), most, who)
    return numbers


def text_tower(folder: Path, config: Any, who: str) -> Any:
    """A CLIP's text tower in float32. UsageError, naming the tensor, if any is missing or has another shape."""
    import transformers

    kind: Any = transformers.CLIPTextModel
    with quiet(), complaining(who, f"transformers does not load the text tower in {str(folder)!r}"):
        tower, report = kind.from_pretrained(
            os.fspath(folder), config=config, local_files_only=True, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    wrong = [name for name, _ in _mismatched(report)]
    wrong += sorted(n for n in report["missing_keys"] if "position_ids" not in n)
    if wrong:
        raise UsageError(who, f"{str(folder)!r} lacks tensors of its text tower, first '{wrong[0]}'")
    return tower
