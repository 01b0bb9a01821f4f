"""Merging safetensors files tensor by tensor, so that memory follows the largest tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mergesec.contracts import Backbone, ContractError, Expert, MergeContext, TaskView
from mergesec.errors import UsageError
from mergesec.files import check_writable
from mergesec.streaming.reading import INDEX, SINGLE, LazyWeights
from mergesec.streaming.writing import Writer
from mergesec.tensorwise import TensorwiseMerge
from mergesec.weights import check_same_layout


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
    if (single and out.is_dir()) or (not single and out.is_file()):
        raise UsageError(
            "--out", f"{out} is a {'folder' if single else 'file'}; name a .safetensors file or a folder"
        )
    taken = _published(out)
    read = {place.file.resolve() for weights in inputs.values() for place in weights.extents.values()}
    if any(file.resolve() in read for file in taken):
        raise UsageError("--out", f"{out} is one of the inputs")
    if taken and not force:
        raise UsageError("--out", f"{taken[0]} exists; --force replaces it")
    check_writable(out.parent if single else out, "--out")


def _published(out: Path) -> list[Path]:
    """Files of an earlier merge (or download) under ``out``."""
    if out.suffix == ".safetensors":
        return [out] if out.exists() else []
    shards = sorted(out.glob("model-*-of-*.safetensors")) if out.is_dir() else []
    return [path for path in (out / SINGLE, out / INDEX) if path.exists()] + shards


@dataclass(frozen=True)
class Written:
    """What a merge of files left."""

    files: list[Path]
    tensors: int
    size: int
    """Bytes of tensors."""


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
    for name, weights in experts.items():
        read = sorted({place.file for place in weights.extents.values()})
        where = read[0] if len(read) == 1 else read[0].parent if read else "no tensors"
        who = f"expert {name!r} ({where})"
        try:
            check_same_layout(base, weights, who)
        except ContractError as error:
            raise UsageError("--expert", str(error)) from None
    check_out(out, {"": base, **experts}, force)
    stale = _published(out)
    kept = {"format": "pt", **base.metadata, **(metadata or {})}
    members = [Expert(name, weights) for name, weights in experts.items()]
    done = 0
    with Writer(out, base, kept, shard_size) as writer:
        for name, tensor in method.stream(base, members, context(method.name, seed)):
            writer.put(name, tensor)
            done += base.extents[name].size
            del tensor  # before the next one is made
            report(name, done)
        files = writer.commit()
    for path in stale:
        if path not in files:
            path.unlink()
    return Written(files, len(base), done)
