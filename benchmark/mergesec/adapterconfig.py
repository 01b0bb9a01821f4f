"""What an adapter_config.json of peft says: options that are merged as peft loads them, all others refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergesec.errors import UsageError, nearest
from mergesec.files import brief, is_file, is_folder
from mergesec.modelfiles import INDEX, SINGLE, read_json, shown

CONFIG, FACTORS = "adapter_config.json", "adapter_model.safetensors"
UNTOUCHED = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base as it is: the factors' product is zero, or is overwritten when they are loaded."""
RESIDUAL = ("pissa", "olora")
"""Ways to begin that take the factors' first product out of the base, the same one whenever they are loaded."""
IDLE = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ephemeral_gpu_offload", "eva_config",
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
})  # fmt: skip
"""Options of training and of files: the merged weights do not depend on them, or only with others that are refused."""
_NAME = re.compile(r"\^?[\w.]{1,300}")
_REPEATED = re.compile(r"(?<!\\)[*+{]")
MOST = 1 << 16


class Lora(NamedTuple):
    """An adapter's options, checked."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    stabilised: bool
    start: str
    """``pissa`` or ``olora`` where the base is changed before the factors are added; else empty."""
    dora: bool
    bias: str
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    saved: tuple[str, ...]
    layers: tuple[int, ...]
    lists: tuple[str, ...]
    """What lists of layers are called (``layers_pattern``)."""

    def rank_of(self, module: str) -> int:
        return self.ranks.get(_key(self.ranks, module), self.rank)

    def scale_of(self, module: str) -> float:
        """α / r, rank-stabilised α / √r."""
        rank = self.rank_of(module)
        alpha = self.alphas.get(_key(self.alphas, module), self.alpha)
        return alpha / (rank**0.5 if self.stabilised else rank)

    def saves(self, module: str) -> bool:
        """Whether a module is one that is stored whole."""
        return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved)

    def takes(self, module: str) -> bool:
        """Whether a module gets factors, by peft's rules."""
        if self.saves(module) or (self.excluded and _named(self.excluded, module)):
            return False
        if self.targets == "all-linear":
            return True
        return _named(self.targets, module) and (
            isinstance(self.targets, str) or not self.layers or self._layer(module) in self.layers
        )

    def _layer(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.lists] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((m for p in patterns if (m := re.match(p, module))), None)
        return int(found[1]) if found else None


def _key(pattern: Mapping[str, Any], module: str) -> str:
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), module)


def _named(which: str | tuple[str, ...], module: str) -> bool:
    if isinstance(which, str):
        return re.fullmatch(which, module) is not None
    return any(module == name or module.endswith("." + name) for name in which)


def is_adapter(place: Path, who: str) -> bool:
    """Whether a folder holds an adapter instead of a network; UsageError if it holds both."""
    if not is_folder(place) or not ((place / CONFIG).exists() or (place / CONFIG).is_symlink()):
        return False
    if is_file(place / SINGLE) or is_file(place / INDEX):
        raise UsageError(
            who,
            f"{brief(str(place))!r} holds a network and an adapter ({CONFIG}); remove the one that is not meant",
        )
    return True


def without_factors(held: Mapping[str, str], base: Mapping[str, Sequence[int]], lora: Lora) -> str:
    """A module that ``target_modules`` names and that has no factors in a file of those of ``held`` (modules to the
    base's tensors); empty if there is none. ``base``: shapes by name."""
    if lora.targets == "all-linear" or not held:
        return ""
    module, own = next(iter(held.items()))
    wrapped = f"{module}.weight"
    prefix = wrapped.removesuffix(own) if wrapped.endswith(own) else ""
    done = set(held.values())
    for name, shape in base.items():
        module = prefix + name.removesuffix(".weight")
        if len(shape) == 2 and name.endswith(".weight") and name not in done and lora.takes(module):
            return module
    return ""


def read_lora(folder: Path, who: str) -> Lora:
    """The options of a folder's adapter; UsageError, naming file, option and value, for what cannot be merged as peft
    would load it."""
    path = folder / CONFIG
    raw = read_json(path, who)
    told = _Told(path, raw, who)
    if raw.get("peft_type") != "LORA":
        told.refuse("peft_type", "'LORA'")
    told.number("r", whole=True)
    told.number("lora_alpha")
    for name in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
        if raw.get(name) is not None and type(raw[name]) is not bool:
            told.refuse(name, "true or false")
    start = raw.get("init_lora_weights", True)
    if not any(start is k or (isinstance(k, str) and start == k) for k in (*UNTOUCHED, *RESIDUAL)):
        told.refuse("init_lora_weights", "true, false, 'gaussian', 'eva', 'orthogonal', 'pissa' or 'olora'")
    if start == "olora" and raw.get("fan_in_fan_out"):
        told.refuse("init_lora_weights", "another start than 'olora' with fan_in_fan_out")
    bias = raw.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        told.refuse("bias", "'none', 'all' or 'lora_only'")
    told.no_others()
    return Lora(
        raw["r"], float(raw["lora_alpha"]), told.pattern("rank_pattern", True), told.pattern("alpha_pattern"),
        raw.get("use_rslora") is True, start if start in RESIDUAL else "", raw.get("use_dora") is True, bias,
        told.modules("target_modules"), told.modules("exclude_modules"), told.names("modules_to_save"), told.layers(),
        told.names("layers_pattern"),
    )  # fmt: skip


_KNOWN = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "init_lora_weights", "bias",
    "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform",
    "layers_pattern",
)  # fmt: skip


class _Told(NamedTuple):
    """A raw config, and how to complain of it."""

    path: Path
    raw: dict[str, Any]
    who: str

    def refuse(self, name: str, wanted: str) -> None:
        given = shown(self.raw[name]) if name in self.raw else "missing"
        raise UsageError(
            self.who,
            f"{brief(str(self.path))!r}: {brief(name)} is {given}; expected {wanted}: other adapters are not merged here "
            "(peft: merge_and_unload, then save_pretrained)",
        )

    def no_others(self) -> None:
        """Options that are not known may stand there at nothing, no or empty."""
        for name, value in self.raw.items():
            if name in _KNOWN or name in IDLE or value is None or value is False or value in ("", [], {}):
                continue
            self.refuse(name, f"no such option, or null{nearest(brief(name), (*_KNOWN, *IDLE))}")

    def number(self, name: str, whole: bool = False) -> None:
        value = self.raw.get(name)
        if not _number(value, whole):
            self.refuse(name, f"a {'whole ' if whole else ''}number above 0, at most {MOST}")

    def pattern(self, name: str, whole: bool = False) -> dict[str, Any]:
        """Names of modules to numbers."""
        value = self.raw.get(name) or {}
        if not isinstance(value, dict) or not all(
            _NAME.fullmatch(key) and _number(v, whole) for key, v in value.items()
        ):
            self.refuse(name, "names of modules with numbers above 0")
        return dict(value)

    def names(self, name: str) -> tuple[str, ...]:
        value = self.raw.get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(v, str) and _NAME.fullmatch(v) for v in value):
            self.refuse(name, "names of modules")
        return tuple(value)

    def modules(self, name: str) -> str | tuple[str, ...]:
        """Names of modules, or a pattern that is no trap: few repetitions, and none of a group."""
        value = self.raw.get(name)
        if not isinstance(value, str):
            return self.names(name)
        if len(value) > 500 or len(_REPEATED.findall(value)) > 3 or re.search(r"\)[*+{]", value):
            self.refuse(name, "names of modules, or a simple regular expression")
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError):
            self.refuse(name, "names of modules, or a regular expression")
        return value

    def layers(self) -> tuple[int, ...]:
        value = self.raw.get("layers_to_transform")
        value = [] if value is None else [value] if isinstance(value, int) else value
        if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value):
            self.refuse("layers_to_transform", "numbers of layers")
        return tuple(value)


def _number(value: Any, whole: bool) -> bool:
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value <= MOST
