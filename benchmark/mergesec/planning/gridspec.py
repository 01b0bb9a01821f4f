"""Grid YAML → a validated, frozen GridSpec. Hydra composes once; nothing of it goes further."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mergesec.errors import UsageError, nearest
from mergesec.files import brief, is_file, remembered
from mergesec.planning.engines import EngineSpec, as_fields
from mergesec.planning.presets import nearest_preset, preset_names, presets_folder
from mergesec.planning.yamlguard import check_yaml
from mergesec.threats import Company, Secrets


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Named = str | dict[str, Any]
Whole = Annotated[int, Field(strict=True)]
"""A number that is written as one: neither true nor 2.0 nor '2'."""
Count = Annotated[int, Field(strict=True, ge=1)]


class Suite(_Strict):
    """Which tasks are merged, on which backbone."""

    name: str = "custom"
    backbone: Named
    tasks: tuple[Named, ...] = Field(min_length=1)
    experts: dict[str, str] = Field(default_factory=dict)
    """Published experts by task, that stand in for fine-tuning: a folder or safetensors file, or
    ``owner/name@commit`` of the hub."""


class Axes(_Strict):
    """What is crossed. A parameter given as a list is an axis of its own."""

    merging: tuple[Named, ...] = Field(min_length=1)
    attacks: tuple[Named, ...] = ("none",)
    defenses: tuple[Named, ...] = ("none",)
    victim: tuple[str, ...] | Literal["all"] = "all"
    adversary: tuple[str, ...] | Literal["all"] = "all"
    target_class: tuple[Whole, ...] | Literal["drawn"] = (0,)
    """``drawn``: one class for each adversary and seed."""
    experts: tuple[Whole | str | tuple[str, ...], ...] = ("all",)
    company: Company = "next"
    protected: tuple[Count, ...] = (1,)
    secrets: tuple[Secrets, ...] = ("own",)
    adversaries: tuple[Count, ...] = Field(default=(1,), min_length=1)
    target_task: tuple[str, ...] = Field(default=("",), min_length=1)


class GridSpec(_Strict):
    """A resolved grid file. See docs/grids.md for every field."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    suite: Suite
    axes: Axes
    threats: tuple[Literal["clean", "protection", "backdoor"], ...] = ("clean", "protection", "backdoor")
    seeds: tuple[Whole, ...] = Field(default=(0,), min_length=1)
    protocol: Literal["inductive", "transductive"] = "inductive"
    plugins: tuple[str, ...] = ()
    """Files with components and their cards, beside those of ``--plugin``."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    include: tuple[dict[str, Any], ...] = ()
    exclude: tuple[dict[str, Any], ...] = ()
    engine: Annotated[EngineSpec, BeforeValidator(as_fields)] | None = Field(default=None, exclude=True)
    """Where its steps run; no part of what is written of a grid."""


# --------------------------------------------------------------------------- reading


def load_grid(source: str, overrides: Sequence[str] = ()) -> GridSpec:
    """Compose a preset by name, or a YAML file by path, with Hydra overrides; UsageError if malformed."""
    folder, name = _locate(source)
    check_yaml(folder / f"{name}.yaml", f"grid {source}")
    if folder == presets_folder() and not overrides:
        raw = remembered(
            "presets.json", f"{name} {_presets_stamp()}", lambda: _composed(source, folder, name, ())
        )
    else:
        raw = _composed(source, folder, name, overrides)
    fields = {"name": name, **{str(k): v for k, v in raw.items()}}
    return parse_grid(fields, f"grid {source}")


def _presets_stamp() -> str:
    """What changes when a preset, or a file that presets take their defaults from, does."""
    found = sorted((str(path), path.stat()) for path in presets_folder().rglob("*.yaml"))
    told = [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in found]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _composed(source: str, folder: Path, name: str, overrides: Sequence[str]) -> dict[Any, Any]:
    """The fields of a grid, as Hydra puts them together: loading it takes longer than planning a small grid."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    search = ["hydra.searchpath=[pkg://mergesec.conf]"] if folder != presets_folder() else []
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
            config = compose(name, overrides=[*map(_may_add, overrides), *search])
        missing = sorted(OmegaConf.missing_keys(config))
        raw = OmegaConf.to_container(config, resolve=True)
    except Exception as error:  # the file's fault, whatever Hydra and OmegaConf make of it
        if _was_interrupted(error):  # which they make something else of, one time in twenty
            raise KeyboardInterrupt from None
        raise UsageError(f"grid {source}", _hydra_message(error, folder)) from None
    if not isinstance(raw, dict):
        raise UsageError(f"grid {source}", "not a mapping of fields")
    if missing:
        raise UsageError(
            f"grid {source}: {missing[0]}", f"needs a value; add {missing[0]}=... to the command"
        )
    return raw


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C began what ended as this error."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _may_add(override: str) -> str:
    """Hydra wants ``++`` to set a field the file lacks; a wrong name is then named by the schema.

    ``suite=NAME`` stays as it is: it picks a file of the group.
    """
    key, _, value = override.partition("=")
    # one's home, which Hydra cannot read and no shell puts in here
    if re.fullmatch(r"~(?:/[^'\\]*)?", value):
        override = f"{key}='{value}'"
    return f"++{override}" if re.fullmatch(r"[A-Za-z_][\w.]*", key) and key != "suite" else override


def _hydra_message(error: Exception, folder: Path) -> str:
    text = " ".join(str(error).split()).split(" See https://hydra.cc")[0]
    if type(error).__module__.partition(".")[0] not in ("hydra", "omegaconf", "yaml"):
        text = f"Hydra cannot compose it ({type(error).__name__}: {text})"
    if "must be a DictConfig" in text:
        return "not a mapping of fields"
    if override := getattr(error, "override", None):
        text = f"cannot read {str(override).removeprefix('++')!r} ({text})"
    for root in (str(folder.resolve()), str(presets_folder())):
        text = text.replace(root, "<grids>")
    return text[:400]


def _locate(source: str) -> tuple[Path, str]:
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or "/" in source:
        if not is_file(path):
            raise UsageError("--grid", f"no file {brief(source)!r}")
        if path.suffix != ".yaml":
            raise UsageError("--grid", f"{brief(source)!r} must end in .yaml")
        return path.resolve().parent, path.stem
    if source not in preset_names():
        raise UsageError("--grid", f"no preset {brief(source)!r}{nearest_preset(source)}")
    return presets_folder(), source


def parse_grid(raw: Mapping[str, Any], where: str) -> GridSpec:
    """Validate; UsageError names the first wrong field, its value and the nearest valid choice."""
    try:
        return GridSpec.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # union branches ("str", "tuple[...]") are pydantic's, not the user's
        path = [p for p in first["loc"] if not isinstance(p, str) or p.isidentifier()]
        spot = ".".join(str(p) for p in path if p not in ("str", "int", "dict", "tuple", "literal"))
        if first["type"] == "extra_forbidden":
            models: dict[str, type[BaseModel]] = {"suite": Suite, "axes": Axes, "engine": EngineSpec}
            model = models.get(str(path[0]) if len(path) > 1 else "", GridSpec)
            message = f"unknown field{nearest(first['loc'][-1], model.model_fields)}"
        else:
            said = first["msg"].replace("a valid tuple", "a list").replace("a valid dictionary", "a mapping")
            own = first["type"] == "value_error"  # a check of ours, whose message names the value itself
            message = said.removeprefix("Value error, ") if own else f"{said}, got {first['input']!r}"[:300]
        raise UsageError(f"{where}: {spot or 'file'}", message) from None
