"""``bench merge METHOD``: merge safetensors files, tensor by tensor, in little memory."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergesec.cli import show
from mergesec.cli.complete import merge_names
from mergesec.cli.options import Plugins
from mergesec.errors import UsageError, nearest
from mergesec.files import brief, is_there, plain
from mergesec.streaming.beside import check_copies, copy_beside

if TYPE_CHECKING:
    from mergesec.planning.catalog import Catalog
    from mergesec.streaming.mapped import LazyWeights
    from mergesec.tensorwise import TensorwiseMerge

_LETTERS = 200
"""In an expert's name, at most."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def main(
    method: Annotated[
        str, typer.Argument(help="a merge method that needs no data", autocompletion=merge_names)
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH|KEY=VALUE", help="experts; then parameters, see bench info METHOD"),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="the base: a .safetensors file, or a folder with one or with shards")
    ] = None,
    expert: Annotated[list[str] | None, typer.Option(help="NAME=PATH or PATH, once per expert")] = None,
    out: Annotated[Path | None, typer.Option(help="a .safetensors file or a folder")] = None,
    shard_size: Annotated[str, typer.Option(help="largest file, e.g. 5GB; empty = one file")] = "",
    seed: Annotated[int, typer.Option(help="for methods that draw at random")] = 0,
    threads: Annotated[
        int | None, typer.Option(help="threads, of linear algebra too (default: all cores)")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace what is there")] = False,
    copy_config: Annotated[
        bool,
        typer.Option("--copy-config", help="put the base's configuration and tokenizer beside the result"),
    ] = False,
    plugin: Plugins = None,
) -> None:
    from mergesec.planning.catalog import load_catalog

    catalog = load_catalog(plugin or ())
    entry = catalog.get("merging", method, "METHOD")
    bare, pairs = _told_apart(words or ())
    bound = entry.card.bind(method, _values(pairs))
    given = [*bare, *(expert or ())]
    if base is None or out is None or not given:
        missing = "--base" if base is None else "--expert" if not given else "--out"
        raise UsageError(missing, "is needed; bench merge METHOD PATH... --base PATH --out PATH")
    paths = _experts(given)
    _check_count(method, entry.card.experts, len(paths))
    limit = _bytes(shard_size) if shard_size else None
    if limit is not None and out.suffix == ".safetensors":
        raise UsageError("--shard-size", f"several files need a folder, and --out is {brief(out.name)!r}")
    if threads is not None and threads < 1:
        raise UsageError("--threads", f"must be at least 1, got {threads}")

    from mergesec.streaming.merging import unfit
    from mergesec.streaming.reading import open_expert, open_weights

    if copy_config:
        check_copies(base, out, force)
    if reason := unfit(entry.load(), entry.card.output, entry.card.wraps):
        raise UsageError("METHOD", f"{method} {reason}{nearest(method, _streaming(catalog))}")
    if bound.get("scaling") == "tuned":
        raise UsageError(f"{method}.scaling", "'tuned' needs data to score on; give a number")
    if threads is not None:
        _limit(threads)
    weights = open_weights(base, "--base")
    experts = {name: open_expert(path, weights, f"--expert {name}") for name, path in paths.items()}
    _merge(entry.create(bound), bound, weights, experts, out, limit, seed, force)
    for path in copy_beside(base, out) if copy_config else ():
        print(plain(str(path)))


def _merge(
    method: TensorwiseMerge, bound: dict[str, Any], base: LazyWeights, experts: dict[str, LazyWeights],
    out: Path, limit: int | None, seed: int, force: bool,
) -> None:  # fmt: skip
    import json
    from importlib.metadata import version

    from mergesec.contracts import ContractError
    from mergesec.streaming.merging import merge_files

    made = {"method": method.name, "parameters": bound, "experts": list(experts), "seed": seed}
    metadata = {"mergesec": json.dumps({"version": version("mergesec"), **made})}
    started = time.monotonic()
    bar = show.ByteBar(base.size)
    ends, position = {}, 0
    for name, extent in base.extents.items():
        position += extent.size
        ends[name] = position
    base.watch = lambda name: bar.look(ends[name])
    try:
        written = merge_files(
            method, base, experts, out, seed=seed, metadata=metadata, shard_size=limit, force=force,
            report=lambda name, done: bar.wrote(done),
        )  # fmt: skip
    except ContractError as error:
        raise UsageError(method.name, str(error).removeprefix(f"{method.name}: ")) from None
    except KeyboardInterrupt:
        print("interrupted; no model was written", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        bar.stop()
    for line in written.told:
        print(f"note: {plain(line)}", file=sys.stderr)
    for path in written.files:
        print(plain(str(path)))
    seconds = time.monotonic() - started
    print(f"{written.tensors} tensors, {written.size / 1e9:.2f} GB, {show.duration(seconds)}")


def _limit(threads: int) -> None:
    """At most so many threads in torch and in the linear algebra of NumPy and SciPy."""
    from importlib import import_module

    import torch

    torch.set_num_threads(threads)
    try:
        import_module("threadpoolctl").threadpool_limits(
            limits=threads
        )  # comes with scikit-learn, by mlxtend
    except ImportError:
        print("warning: threadpoolctl is missing; --threads limits torch only", file=sys.stderr)


def _values(pairs: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """``key=value`` arguments as YAML values, numbers like 1e-3 included."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import AliasEvent, SafeLoader, YAMLError, parse

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, _ = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError("parameter", f"{brief(pair)!r} is not key=value, nor a file or folder")
        if key in found:
            raise UsageError("parameter", f"{key} is given twice")
        try:
            if any(isinstance(event, AliasEvent) for event in parse(pair[len(key) + 1 :], Loader=SafeLoader)):
                raise ValueError("aliases expand to more than they say")
            found[key] = OmegaConf.to_container(OmegaConf.from_dotlist([pair]))[key]  # type: ignore[index, call-overload]
        except (YAMLError, OmegaConfBaseException, ValueError, RecursionError):
            raise UsageError("parameter", f"cannot read {brief(pair)!r}") from None
    return found


def _told_apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths of experts, and parameters: what looks like one is a parameter unless a file or folder is called so."""
    pairs = [word for word in words if re.match(r"[A-Za-z_]\w*(=|$)", word) and not is_there(Path(word))]
    return [word for word in words if word not in pairs], pairs


def _experts(given: Sequence[str]) -> dict[str, Path]:
    """NAME=PATH, or a path, whose name is the expert's."""
    paths: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or is_there(Path(text)):
            name, path = _stem(Path(text)), text
        if not (name and path):
            raise UsageError("--expert", f"{brief(text)!r} is neither NAME=PATH nor a path")
        if plain(name) != name or len(name) > _LETTERS:
            raise UsageError(
                "--expert", f"the name {brief(name)!r} cannot be printed or exceeds {_LETTERS} characters"
            )
        if name in paths:
            raise UsageError("--expert", f"two experts are called {name!r}; give NAME=PATH")
        paths[name] = Path(path)
    return paths


def _stem(path: Path) -> str:
    """What an expert is called by its path: the folder's name, where files in folders are called alike."""
    alike = path.name in ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    return path.resolve().parent.name if alike else path.name.removesuffix(".safetensors")


def _check_count(method: str, bounds: tuple[int, int], count: int) -> None:
    fewest, most = bounds
    if count < fewest or (most and count > most):
        wanted = (
            f"exactly {fewest}"
            if fewest == most
            else f"at least {fewest}"
            if count < fewest
            else f"at most {most}"
        )
        raise UsageError("--expert", f"{method} takes {wanted} experts, got {count}")


def _bytes(text: str) -> int:
    """``5GB``, ``500 MiB`` or a plain number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]I?)?B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise UsageError("--shard-size", f"{brief(text)!r} is not a size such as 5GB")
    return size


def _streaming(catalog: Catalog) -> list[str]:
    """Names of the merge methods that can go through files."""
    from mergesec.streaming.merging import unfit

    found = []
    for name, entry in catalog.entries["merging"].items():
        try:
            if unfit(entry.load(), entry.card.output, entry.card.wraps) is None:
                found.append(name)
        except Exception:
            continue  # a method that does not load is no choice; bench doctor tells why
    return found
