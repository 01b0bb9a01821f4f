"""The room FusionBench's algorithms run in, and what goes in and out of it.

FusionBench is written for a process of its own: it overwrites the networks it is handed, draws from
the global random generators, prints, logs, writes below the working folder, keeps a cache keyed by
path, and changes ``sys.excepthook``, warning filters and environment variables when imported. Here
it gets networks of its own and its own corner of the process, which is put back afterwards.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import os
import random
import sys
import tempfile
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mergesec.compat import ensure_torchvision
from mergesec.contracts import (
    Backbone,
    Context,
    ContractError,
    Expert,
    MergeContext,
    Merged,
    MergeMethod,
    Weights,
    load_network,
)
from mergesec.tensorwise import check_experts
from mergesec.weights import mergeable, owners

PRETRAINED, MERGED = "_pretrained_", "_merged_"
"""The names FusionBench's model pools know the base and an earlier merge by."""

# --------------------------------------------------------------------------- the room


@contextlib.contextmanager
def sandbox(ctx: Context) -> Iterator[None]:
    """Import and run FusionBench inside; on leaving, the process is as it was.

    Put back: working folder, environment, random generators (``random``, NumPy, torch on every
    device), output streams, logging, exception hook, warning filters, gradient mode, FusionBench's
    cache folder, and the two names that it misses on Python 3.11 and transformers 5. What it printed
    last becomes a note on an exception.
    """
    ensure_torchvision()
    printed = io.StringIO()
    with contextlib.ExitStack() as room:
        parts = (
            _environment(),
            _hooks(),
            _silence(printed),
            _aliases(),
            _folder(),
            _randomness(),
            _cpu(ctx),
        )
        for part in parts:
            room.enter_context(part)
        room.enter_context(torch.enable_grad())
        try:
            yield
        except Exception as error:
            if tail := printed.getvalue().strip()[-500:]:
                error.add_note(f"FusionBench printed last: {tail}")
            raise


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


@contextlib.contextmanager
def _hooks() -> Iterator[None]:
    hook = sys.excepthook
    with warnings.catch_warnings():
        try:
            yield
        finally:
            sys.excepthook = hook


@contextlib.contextmanager
def _silence(printed: io.StringIO) -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


@contextlib.contextmanager
def _aliases() -> Iterator[None]:
    """``typing.override`` (Python 3.12) and CLIP's vision transformer (gone in transformers 5), if missing."""
    import typing_extensions
    from transformers.models.clip import modeling_clip

    wanted = [
        (typing, "override", typing_extensions.override),
        (modeling_clip, "CLIPVisionTransformer", modeling_clip.CLIPVisionModel),
    ]
    lent = [(module, name) for module, name, _ in wanted if not hasattr(module, name)]
    for module, name, value in wanted:
        if (module, name) in lent:
            setattr(module, name, value)
    try:
        yield
    finally:
        for module, name in lent:
            delattr(module, name)


@contextlib.contextmanager
def _folder() -> Iterator[None]:
    """An empty working folder, with FusionBench's cache of heads in it."""
    cache: Any = importlib.import_module("fusion_bench.utils.cache_utils")
    before = cache.DEFAULT_CACHE_DIR
    with tempfile.TemporaryDirectory(prefix="mergesec-") as folder:
        try:
            cache.set_default_cache_dir(Path(folder) / "cache")
            with contextlib.chdir(folder):
                yield
        finally:
            cache.set_default_cache_dir(before)


@contextlib.contextmanager
def _randomness() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def draw_seed(ctx: Context, stream: int = 0) -> int:
    """An integer in [0, 2³¹) from the context, for code that takes a seed and no generator."""
    return int(torch.randint(2**31, (), generator=ctx.generator(stream)))


@contextlib.contextmanager
def _cpu(ctx: Context) -> Iterator[None]:
    """On a CPU: no GPU to be seen (several classes take the first they see), one thread.

    Most of the work is many small matrices, where a second thread costs up to a hundred times what it
    saves as soon as another process wants the core.
    """
    if ctx.device.type != "cpu":
        yield
        return
    threads, available = torch.get_num_threads(), torch.cuda.is_available
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = available
        torch.set_num_threads(threads)


def execute(built: Any, models: Any, ctx: Context) -> Any:
    """What the algorithm's ``run`` returns for a pool, computed on the context's device.

    Algorithms that use Lightning get a Fabric; they would make one for the first GPU they see. The
    generators are seeded here and not earlier: importing FusionBench draws from them.
    """
    import lightning

    index = [ctx.device.index or 0] if ctx.device.type == "cuda" else 1
    fabric = lightning.Fabric(accelerator=ctx.device.type, devices=index)
    fabric.launch()
    slots = [name for name in ("_fabric_instance", "_fabric") if hasattr(built, name)]
    for name in slots:
        setattr(built, name, fabric)
    seed = draw_seed(ctx)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        return built.run(models)
    finally:
        for name in slots:  # one destroyed with a Fabric at the interpreter's exit prints an error
            setattr(built, name, None)


def find(target: str) -> Any:
    """The class or function ``<module>:<name>`` below ``fusion_bench``."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(f"fusion_bench.{module}"), name)


def configuration(content: dict[str, Any]) -> Any:
    """What FusionBench's older classes take in place of arguments."""
    return importlib.import_module("omegaconf").DictConfig(content)


# --------------------------------------------------------------------------- what goes in


def fresh_network(backbone: Backbone, weights: Weights) -> nn.Module:
    """A float32 network on the CPU with memory of its own, as FusionBench's state-dict arithmetic needs it.

    Integer buffers stay where the forward pass finds them but are left out of ``state_dict`` (several
    algorithms fail on them), and tied parameters come apart (others would merge them twice).
    """
    network = load_network(backbone, {n: t.cpu() for n, t in weights.items()}).float()
    seen: set[int] = set()
    for module in network.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not mergeable(buffer):
                module._non_persistent_buffers_set.add(name)
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in seen:
                module.register_parameter(name, nn.Parameter(parameter.detach().clone()))
            elif parameter is not None:
                seen.add(id(parameter.requires_grad_(True)))
    return network


def pool(networks: Mapping[str, nn.Module]) -> Any:
    """FusionBench's pool of in-memory networks."""
    return find("modelpool:BaseModelPool")(dict(networks))


# --------------------------------------------------------------------------- what comes out


def harvest(found: Mapping[str, Tensor], base: Weights, experts: Sequence[Expert], who: str) -> Weights:
    """``found`` in the base's names, shapes, types and device.

    Names it lacks, integer buffers and tensors that no expert changed are the base's; tied names get
    their owner's value. Raises ContractError for a tensor of another size.
    """
    tied = owners(base)
    merged: dict[str, Tensor] = {}
    for name, own in base.items():
        value = found.get(tied.get(name, name))
        if value is None or not mergeable(own) or all(torch.equal(e.weights[name], own) for e in experts):
            merged[name] = own
            continue
        if value.numel() != own.numel():
            raise ContractError(f"{who}: '{name}' came back as {list(value.shape)}, not {list(own.shape)}")
        merged[name] = value.detach().reshape(own.shape).to(device=own.device, dtype=own.dtype, copy=True)
    return merged


_TRACED = "_ray_trace_ctx"


class FusionBenchMerge(MergeMethod):
    """A merge done by a class of FusionBench on networks built from the backbone.

    Parameters are FusionBench's own, under FusionBench's names. A subclass says which class
    (``target``) and overrides what differs.
    """

    target: ClassVar[str] = ""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """Arguments the class insists on that are no choice here."""

    def __init__(self, **parameters: Any) -> None:
        self.parameters = parameters

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        check_experts(base, experts)
        with sandbox(ctx):
            return self.read(self.run(base, experts, ctx), base, experts, ctx)

    def arguments(self, ctx: MergeContext) -> dict[str, Any]:
        """The constructor's keyword arguments."""
        return {**self.parameters, **self.fixed}

    def networks(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> dict[str, nn.Module]:
        """The pool: FusionBench's name → a network it may do with as it likes. Experts are named by place."""
        return {who: fresh_network(ctx.backbone, w) for who, w in everyone(base, experts).items()}

    def run(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Any:
        """Whatever FusionBench's ``run`` returns."""
        built = _without_actors(find(self.target))(**self.arguments(ctx))
        return execute(built, pool(self.networks(base, experts, ctx)), ctx)

    def read(self, result: Any, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        """The result as a ``Merged``."""
        return Merged(harvest(result.state_dict(), base, experts, self.name), info=self.facts())

    def facts(self) -> dict[str, Any]:
        return {"fusion_bench": version("fusion-bench")}


def place(index: int) -> str:
    """The pool's name for an expert: task names hold characters that FusionBench warns about."""
    return f"expert_{index}"


def everyone(base: Weights, experts: Sequence[Expert]) -> dict[str, Weights]:
    """The pool's names with the weights behind them."""
    return {PRETRAINED: base} | {place(i): e.weights for i, e in enumerate(experts)}


# --------------------------------------------------------------------------- carriers


def matrices(backbone: Backbone) -> dict[str, str]:
    """``{tensor: "attn" | "mlp"}`` of the weight matrices inside the backbone's blocks, in order."""
    found: dict[str, str] = {}
    for block in backbone.anatomy().blocks:
        found |= {linear.weight: "attn" for linear in block.attention.maps}
        found |= {linear.weight: "mlp" for linear in block.mlp.maps}
    return found


def carrier(weights: Weights, names: Mapping[str, str]) -> nn.Module:
    """A module that only holds tensors: ``name`` as the float32 buffer ``names[name]``.

    For algorithms that choose tensors by what CLIP's are called, and never run the network. Buffers,
    because FusionBench's arithmetic refuses to add tensors to parameters.
    """
    module = nn.Module()
    for old, new in names.items():
        module.register_buffer(new, weights[old].detach().cpu().float().clone())
    return module


def uncarried(found: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """A carrier's tensors under the backbone's names again."""
    return {old: found[new] for old, new in names.items()}


def _without_actors(kind: type[Any]) -> type[Any]:
    """A class that can be built where Ray is installed: made into an actor, its constructor has a parameter more,
    which FusionBench looks for among those that a configuration names."""
    known = getattr(kind, "_config_mapping", None)
    if known is not None and _TRACED not in known and _TRACED in inspect.signature(kind).parameters:
        known[_TRACED] = _TRACED
    return kind
