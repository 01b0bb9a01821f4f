"""Merging safetensors files tensor by tensor, so that memory follows the largest tensor."""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mergesec.contracts import Backbone, ContractError, Expert, MergeContext, TaskView
from mergesec.errors import UsageError
from mergesec.files import brief, check_writable, uncollected
from mergesec.streaming.mapped import LazyWeights
from mergesec.streaming.meaning import other_function
from mergesec.streaming.reading import INDEX, SINGLE
from mergesec.streaming.writing import SHARD, Writer, finite
from mergesec.tensorwise import TensorwiseMerge
from mergesec.weights import check_same_layout, fit_names, mergeable


class _Absent(Mapping[str, Any]):
    """Stands where a context has a network or data: any use says that there is none."""

    def __init__(self, method: str, what: str) -> None:
        self.__dict__.update(method=method, what=what)

    def _refuse(self, *_: object) -> Any:
        raise ContractError(f"{self.method} needs {self.what}, which a merge of files does not have")

    __getitem__ = __iter__ = __len__ = __call__ = _refuse

    def __getattr__(self, name: str) -> Any:
        self._refuse()


def context(method: str, seed: int) -> MergeContext:
    """A context without network and data: asking for either is a ContractError naming ``method``."""
    data = _Absent(method, "data")
    network = cast(Backbone, _Absent(method, "a network"))
    return MergeContext(torch.device("cpu"), seed, network, cast("Mapping[str, TaskView]", data), data)


def unfit(cls: type[Any], output: str = "static", wraps: str = "") -> str | None:
    """Why a merge method cannot go tensor by tensor through files, or None if it can."""
    if not issubclass(cls, TensorwiseMerge):
        return "needs the whole network at once"
    if output != "static":
        return "makes more than one set of weights"
    if wraps or cls.merge is not TensorwiseMerge.merge or cls.stream is not TensorwiseMerge.stream:
        return "does more than merge tensor by tensor"
    return None


def check_out(out: Path, inputs: Mapping[str, LazyWeights], force: bool) -> None:
    """UsageError unless ``out`` (a ``.safetensors`` file or a folder) may be written."""
    single = out.suffix == ".safetensors"
    try:
        str(out).encode()  # safetensors opens no other names
        exists = stat.S_ISREG if single else stat.S_ISDIR
        fits = not (out.exists() or out.is_symlink()) or exists(out.stat().st_mode)
        taken = _published(out)
        files = {place.file for weights in inputs.values() for place in weights.extents.values()}
        read = {file.resolve() for file in files}
        own = any(file.resolve() in read for file in taken)
    except (OSError, ValueError, RuntimeError) as error:  # no place has such a name, or links lead nowhere
        raise UsageError("--out", f"cannot write to {brief(str(out))!r} ({brief(str(error))})") from None
    if not fits:
        kind = "a folder" if out.is_dir() else "a file" if out.is_file() else "neither a file nor a folder"
        raise UsageError("--out", f"{out} is {kind}; name a .safetensors file or a folder")
    if own:
        raise UsageError("--out", f"{out} is one of the inputs")
    if taken and not force:
        raise UsageError("--out", f"{taken[0]} exists; --force replaces it")
    check_writable(out.parent if single else out, "--out")


def _published(out: Path) -> list[Path]:
    """Files of an earlier merge (or download) under ``out``."""
    if out.suffix == ".safetensors":
        return [out] if out.exists() or out.is_symlink() else []
    if not out.is_dir():
        return []
    shards = sorted(path for path in out.iterdir() if SHARD.fullmatch(path.name))
    return [path for path in (out / SINGLE, out / INDEX) if path.exists() or path.is_symlink()] + shards


def fitted(base: LazyWeights, weights: LazyWeights, who: str) -> tuple[LazyWeights, str]:
    """``weights`` with the names of ``base`` (see ``weights.fit_names``), and what to tell of parts that only one of
    them has: those of the base stay as they are. UsageError naming ``who`` and the tensor if they do not fit."""
    if reason := other_function(base.config, weights.config):
        raise UsageError("--expert", f"{who}: {reason}; the same weights compute something else there")
    shapes = [{name: extent.shape for name, extent in w.extents.items()} for w in (base, weights)]
    fit = fit_names(*shapes)
    found, told = weights, []
    if fit is not None:
        same = {name: weights.extents[fit.names[name]] for name in base if name in fit.names}
        found = LazyWeights({**base.extents, **same}, weights.metadata)
        told += [f"left out {_counted(fit.left)}"] if fit.left else []
        told += [f"of the base stays as it is: {_counted(fit.kept)}"] if fit.kept else []
    try:
        found.check_unchanged()
        check_same_layout(base, found, who)
        _check_integers(base, found, who)
    except ContractError as error:
        raise UsageError("--expert", str(error)) from None
    return found, "; ".join(told)


def _counted(names: list[str]) -> str:
    shown = ", ".join(brief(name) for name in names[:3])
    return f"{shown}, ... ({len(names)} tensors)" if len(names) > 3 else shown


def _check_integers(base: LazyWeights, weights: LazyWeights, who: str) -> None:
    """ContractError if integers differ, counters of batches apart: a merge keeps the base's, and would lose them."""
    for name, extent in base.extents.items():
        if extent.dtype.is_floating_point or name.endswith("num_batches_tracked"):
            continue
        if not torch.equal(base[name].to(torch.int64), weights[name].to(torch.int64)):
            kind = str(extent.dtype).removeprefix("torch.")
            raise ContractError(
                f"{who}: tensor '{name}' ({kind}) differs from the base's; integers are not merged"
            )


@dataclass(frozen=True)
class Written:
    """What a merge of files left."""

    files: list[Path]
    tensors: int
    size: int
    """Bytes of tensors."""
    told: list[str]
    """What was not merged of an input, a line each."""


@uncollected()
def merge_files(
    method: TensorwiseMerge,
    base: LazyWeights,
    experts: Mapping[str, LazyWeights],
    out: Path,
    *,
    seed: int = 0,
    metadata: Mapping[str, str] | None = None,
    shard_size: int | None = None,
    force: bool = False,
    report: Callable[[str, int], None] = lambda name, done: None,
) -> Written:
    """Merge ``experts`` into ``base`` and write ``out``. ``report(name, bytes written so far)`` per tensor.

    Raises UsageError (inputs or ``out`` do not fit), ContractError (the method refuses) or Full.
    """
    members, told = [], []
    for name, weights in experts.items():
        fit, news = fitted(base, weights, f"expert {name!r} ({_place(weights)})")
        members.append(Expert(name, fit))
        told += [f"expert {name!r}: {news}"] if news else []
    check_out(out, {"": base, **experts}, force)
    stale = _published(out)
    kept = {"format": "pt", **base.metadata, **(metadata or {})}
    done = 0
    with Writer(out, base, kept, shard_size) as writer:
        try:
            for name, tensor in method.stream(base, members, context(method.name, seed)):
                writer.put(name, tensor)
                done += base.extents[name].size
                del tensor  # before the next one is made
                report(name, done)
        except (ContractError, RuntimeError, ArithmeticError) as error:
            _blame({"base": base, **experts}, error)
            raise
        files = writer.commit(stale)
    return Written(files, len(base), done, told)


def _place(weights: LazyWeights) -> Path:
    """The file that weights lie in, or their folder."""
    files = sorted({place.file for place in weights.extents.values()})
    return files[0] if len(files) == 1 else files[0].parent


def _blame(inputs: Mapping[str, LazyWeights], error: Exception) -> None:
    """ContractError naming the input whose values are not finite, if that is why a merge failed."""
    for who, weights in inputs.items():
        for name, extent in weights.extents.items():
            if mergeable(tensor := extent.read()) and not finite(tensor):
                raise ContractError(
                    f"{who} ({extent.file}): tensor '{name}' has values that are not finite"
                ) from error
