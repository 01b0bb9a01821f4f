"""What ``measure_merging.py`` measures: our merge methods and, where they have them, FusionBench's and mergekit's.

A subject makes its inputs outside the clock and hands back a function to be timed.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
Run = Callable[[], Any]

FUSION_BENCH: dict[str, tuple[str, str, dict[str, Any]]] = {
    "simple_average": ("simple_average", "SimpleAverageAlgorithm", {"show_pbar": False}),
    "weighted_average": ("weighted_average.weighted_average", "WeightedAverageAlgorithm", {"normalize": True}),
    "task_arithmetic": ("task_arithmetic.task_arithmetic", "TaskArithmeticAlgorithm", {"scaling_factor": 0.3}),
    "ties": (
        "ties_merging.ties_merging", "TiesMergingAlgorithm",
        {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"},
    ),
    "dare": (
        "dare.task_arithmetic", "DareTaskArithmetic",
        {"scaling_factor": 0.3, "sparsity_ratio": 0.5, "only_on_linear_weights": False},
    ),
    "magmax": ("magmax.magmax", "MagMaxAlgorithm", {"scaling_factor": 0.5}),
    "model_stock": ("model_stock.model_stock", "ModelStock", {}),
    "slerp": ("slerp.slerp", "SlerpMergeAlgorithm", {"t": 0.5}),
    "emr": ("emr_merging.emr_merging", "EMRMerging", {}),
    "iso_c": ("isotropic_merging.iso", "ISO_C_Merge", {"scaling_factor": 1.0}),
    "iso_cts": ("isotropic_merging.iso", "ISO_CTS_Merge", {"scaling_factor": 1.0, "common_space_fraction": 0.8}),
    "tsv_m": ("task_singular_vector.TSVM", "TaskSingularVectorMerging", {"alpha": 1.0}),
    "wudi": ("wudi.wudi", "WUDIMerging", {"iter_num": 300}),
}  # fmt: skip
"""Our name -> FusionBench's module under ``fusion_bench.method``, class and arguments (its defaults)."""

MERGEKIT: dict[str, tuple[str, dict[str, Any]]] = {
    "simple_average": ("linear", {"weight": 1.0}),
    "weighted_average": ("linear", {"weight": 1.0}),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.3}),
    "ties": ("ties", {"weight": 0.3, "density": 0.2}),
    "dare": ("dare_linear", {"weight": 0.3, "density": 0.5}),
    "breadcrumbs": ("breadcrumbs", {"weight": 0.3, "density": 0.85, "gamma": 0.01}),
    "della": ("della_linear", {"weight": 0.3, "density": 0.5}),
    "model_stock": ("model_stock", {}),
    "slerp": ("slerp", {"t": 0.5}),
}
"""Our name -> mergekit's method and arguments. It works tensor by tensor: its TIES trims each by itself."""


FIXED: dict[str, dict[str, Any]] = {
    "consensus": {"mask_lambda": 0.4}, "tall_masks": {"mask_lambda": 0.4}, "paint": {"alpha": 0.5},
}  # fmt: skip
"""Numbers for parameters that would be tuned on data by default."""


@dataclass(frozen=True)
class Scale:
    """The network's shapes: a CLIP vision tower, or a stack of square matrices with ``parameters`` entries."""

    name: str

    def shapes(self) -> dict[str, tuple[int, ...]]:
        if self.name.isdigit():
            return _stack(int(self.name))
        with torch.device("meta"):
            return {n: tuple(t.shape) for n, t in _clip(self.name).state_dict().items()}

    def module(self, weights: Tensors) -> torch.nn.Module:
        """A network that owns ``weights``."""
        with torch.device("meta"):
            module = _clip(self.name)
        module.load_state_dict(weights, assign=True)
        for name, buffer in list(module.named_buffers()):
            if buffer.is_meta:  # ids of positions, which are not saved
                owner, _, last = name.rpartition(".")
                module.get_submodule(owner).register_buffer(
                    last, torch.arange(buffer.numel()).view(1, -1), False
                )
        return module


def _stack(parameters: int) -> dict[str, tuple[int, ...]]:
    width = 768 if parameters >= 4 * 768**2 else 64
    shapes: dict[str, tuple[int, ...]] = {}
    left = parameters
    while left >= width * width:
        shapes[f"layer{len(shapes)}"] = (width, width)
        left -= width * width
    return {**shapes, "rest": (left,)} if left else shapes


def _clip(scale: str) -> torch.nn.Module:
    from mergesec.compat import ensure_torchvision

    ensure_torchvision()
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes: dict[str, int] = {} if scale == "vit-b-32" else {
        "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    return CLIPVisionModel(CLIPVisionConfig(**sizes))


def draw(shapes: Mapping[str, tuple[int, ...]], count: int, device: str = "cpu") -> list[Tensors]:
    """A base and ``count`` experts, float32: weights of deviation 0.02, task vectors of 0.001."""
    rng = np.random.default_rng(0)

    def normal(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).mul_(scale)

    base = {name: normal(shape, 0.02) for name, shape in shapes.items()}
    drawn = [base]
    for _ in range(count):
        drawn.append({name: normal(shape, 0.001).add_(base[name]) for name, shape in shapes.items()})
    return [{name: tensor.to(device) for name, tensor in weights.items()} for weights in drawn]


# --------------------------------------------------------------------------- libraries


def own(method: str, parameters: Mapping[str, Any], scale: Scale, inputs: list[Tensors]) -> Run:
    """``method`` of the catalogue with default parameters, but for those given."""
    from dataclasses import replace

    from mergesec.contracts import Expert
    from mergesec.planning.catalog import load_catalog
    from mergesec.streaming.merging import context

    entry = load_catalog().get("merging", method)
    made = entry.create(entry.card.bind(method, {**FIXED.get(method, {}), **parameters}))
    experts = [Expert(str(i), weights) for i, weights in enumerate(inputs[1:])]
    ctx = replace(context(method, 0), device=next(iter(inputs[0].values())).device)
    return lambda: made.merge(inputs[0], experts, ctx)


def fusion_bench(method: str, parameters: Mapping[str, Any], scale: Scale, inputs: list[Tensors]) -> Run:
    """The class of FusionBench on a pool of networks, which it changes in place."""
    from mergesec.compat import ensure_torchvision

    ensure_torchvision()
    from fusion_bench import BaseModelPool

    module, name, arguments = FUSION_BENCH[method]
    arguments = {**arguments, **parameters}
    if method == "weighted_average":
        arguments["weights"] = [1.0] * (len(inputs) - 1)
    algorithm = getattr(import_module(f"fusion_bench.method.{module}"), name)(**arguments)
    names = ["_pretrained_", *(f"expert{i}" for i in range(len(inputs) - 1))]
    if method == "slerp":
        names[0] = "_unused_"
    pool = BaseModelPool({n: scale.module(w) for n, w in zip(names, inputs, strict=True) if n != "_unused_"})

    def run() -> Any:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return algorithm.run(pool)

    return run


def mergekit(method: str, parameters: Mapping[str, Any], scale: Scale, inputs: list[Tensors]) -> Run:
    """mergekit's method on tensors in memory, without its readers and writers."""
    from mergesec.compat import ensure_torchvision

    ensure_torchvision()
    registry = import_module("mergekit.merge_methods.registry")
    group = import_module("mergekit.merge_methods.base").TensorGroup
    name, arguments = MERGEKIT[method]
    skip = 1 if method in ("simple_average", "weighted_average") else 0
    anchor = None if skip else 0
    rows = inputs[:3][1:] if method == "slerp" else inputs[skip:]
    groups = [group.from_tensors([w[n] for w in rows], base_index=anchor, name=n) for n in inputs[0]]
    made = registry.get(name)

    def run() -> Any:
        with torch.no_grad():
            return made(groups, parameters={**arguments, **parameters})

    return run


LIBRARIES: dict[str, Callable[[str, Mapping[str, Any], Scale, list[Tensors]], Run]] = {
    "own": own, "fusionbench": fusion_bench, "mergekit": mergekit,
}  # fmt: skip


# --------------------------------------------------------------------------- what there is


def data_free() -> list[str]:
    """Names of the catalogue's own merge methods that run without data and without a network."""
    from mergesec.contracts import Expert
    from mergesec.planning.catalog import load_catalog
    from mergesec.streaming.merging import context

    drawn = draw({"block.weight": (12, 8), "block.bias": (12,)}, 3)
    found = []
    for entry in load_catalog():
        card = entry.card
        if card.kind != "merging" or card.wraps or card.name.startswith("fusionbench/"):
            continue
        members = [Expert(str(i), w) for i, w in enumerate(drawn[1:])][: card.experts[1] or None]
        try:
            method = entry.create(entry.card.bind(card.name, {**card.trial, **FIXED.get(card.name, {})}))
            method.merge(drawn[0], members, context(card.name, 0))
        except Exception as error:
            print(f"left out: {card.name} ({str(error)[:80]})", file=sys.stderr)
            continue
        found.append(card.name)
    return found


def most_experts(method: str, count: int) -> int:
    """``count``, or fewer if the method takes fewer."""
    from mergesec.planning.catalog import load_catalog

    return min(count, load_catalog().get("merging", method).card.experts[1] or count)


# --------------------------------------------------------------------------- other subjects


def matching(kind: str, width: int) -> Run:
    """Twelve MLPs of ``width`` hidden units (1537 features at 3072) rearranged to a reference, as Git Re-Basin does it.

    ``near``: permuted copies with noise, as experts are. ``far``: unrelated units, so that twelve full
    assignment problems have to be solved; ``scipy`` is the same with SciPy's solver on the raw scores.
    """
    from mergesec.surgery import assign
    from mergesec_methods._matching import Anchors

    rng = np.random.default_rng(0)
    shape = (width, width // 2 + 1)
    reference = torch.from_numpy(rng.standard_normal(shape))
    units = []
    for _ in range(12):
        noise = torch.from_numpy(rng.standard_normal(shape))
        order = torch.from_numpy(rng.permutation(width))
        units.append((reference[order] + 0.1 * noise) if kind == "near" else noise)

    def run() -> None:
        for own_units in units:
            if kind == "scipy":
                assign(own_units @ reference.T, maximize=True)
            else:
                Anchors(reference).order(own_units)

    return run
