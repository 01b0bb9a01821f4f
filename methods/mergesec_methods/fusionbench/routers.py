"""FusionBench's merges that put routers into the network: SMILE and weight-ensembling experts."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesec.contracts import (
    Backbone,
    Context,
    ContractError,
    Expert,
    MergeContext,
    Merged,
    Model,
    Weights,
    load_network,
)
from mergesec_methods.fusionbench._adapter import (
    FusionBenchMerge,
    configuration,
    execute,
    find,
    harvest,
    place,
    pool,
    sandbox,
)
from mergesec_methods.merging._adaptation import Stream
from mergesec_methods.merging._blocks import block_paths

CARDS = [
    {
        "name": "fusionbench/smile",
        "kind": "merging",
        "class": "Smile",
        "version": "1",
        "title": "SMILE",
        "paper": "Tang et al., SMILE: zero-shot sparse mixture of low-rank experts, 2024",
        "url": "https://arxiv.org/abs/2408.10174",
        "summary": "each linear layer gets a low-rank expert per task and a router made of singular vectors",
        "output": "per_task",
        "data": "none",
        "modalities": ["image", "text"],
        "seeded": False,
        "depends": ["fusion-bench"],
        "requires": {"fusion_bench": "mergesec[fusionbench]"},
        "parameters": {
            "gate_k": {
                "type": "int",
                "default": 16,
                "min": 1,
                "max": 65536,
                "doc": "singular vectors per expert in the router; FusionBench's config has 1, its example 16",
            },
            "k": {
                "type": "int",
                "default": 32,
                "min": 1,
                "max": 65536,
                "doc": "rank of the experts; FusionBench's config has 128, its example for ViT-B/32 32",
            },
            "top_k": {
                "type": "int",
                "default": 1,
                "min": 1,
                "max": 65536,
                "doc": "experts a token is sent to; all where there are fewer",
            },
            "average_experts": {
                "type": "bool",
                "default": False,
                "doc": "average what is not linear, instead of keeping the base's",
            },
        },
    },
    {
        "name": "fusionbench/we_moe",
        "kind": "merging",
        "class": "WeMoe",
        "version": "1",
        "title": "Weight-ensembling mixture of experts",
        "paper": "Tang et al., Merging multi-task models via weight-ensembling mixture of experts, ICML 2024",
        "url": "https://arxiv.org/abs/2402.00433",
        "summary": "task arithmetic, but each MLP's coefficients come from a router adapted by entropy",
        "output": "per_task",
        "data": "tuning",
        "modalities": ["image", "text"],
        "seeded": True,
        "depends": ["fusion-bench"],
        "requires": {"fusion_bench": "mergesec[fusionbench]"},
        "trial": {"max_steps": 3},
        "parameters": {
            "router_hidden_layers": {
                "type": "int",
                "default": 2,
                "min": 1,
                "max": 2,
                "doc": "layers of the routers",
            },
            "init_lambda": {
                "type": "float",
                "default": 0.3,
                "min": 0.0,
                "max": 10.0,
                "doc": "scaling coefficient outside the MLPs, and what routers start from",
            },
            "batch_reduce": {
                "type": "bool",
                "default": True,
                "doc": "one routing per batch while adapting; the merged network always routes per sample",
            },
            "lr": {"type": "float", "default": 0.0001, "min": 0.0, "max": 10.0, "doc": "Adam's step size"},
            "batch_size": {
                "type": "int",
                "default": 16,
                "min": 1,
                "max": 65536,
                "doc": "inputs per task and step",
            },
            "max_steps": {"type": "int", "default": 1000, "min": 0, "max": 1000000, "doc": "Adam steps"},
        },
    },
    {
        "name": "fusionbench/e_we_moe",
        "kind": "merging",
        "class": "EWeMoe",
        "version": "1",
        "title": "Efficient weight-ensembling mixture of experts",
        "paper": "Shen et al., Efficient and effective weight-ensembling mixture of experts, 2024",
        "url": "https://arxiv.org/abs/2410.21804",
        "summary": "weight-ensembling experts with one router for all blocks and pruned task vectors",
        "output": "per_task",
        "data": "tuning",
        "modalities": ["image", "text"],
        "seeded": True,
        "depends": ["fusion-bench"],
        "requires": {"fusion_bench": "mergesec[fusionbench]"},
        "trial": {"max_steps": 3},
        "parameters": {
            "router_hidden_layers": {
                "type": "int",
                "default": 2,
                "min": 1,
                "max": 2,
                "doc": "layers of the routers",
            },
            "init_lambda": {
                "type": "float",
                "default": 0.3,
                "min": 0.0,
                "max": 10.0,
                "doc": "scaling coefficient outside the MLPs, and what routers start from",
            },
            "tv_prune_ratio": {
                "type": "float",
                "default": 0.9,
                "min": 0.0,
                "max": 1.0,
                "doc": "share of each MLP tensor's task vector that is dropped, by magnitude",
            },
            "batch_reduce": {
                "type": "bool",
                "default": True,
                "doc": "one routing per batch while adapting; the merged network always routes per sample",
            },
            "lr": {"type": "float", "default": 0.0001, "min": 0.0, "max": 10.0, "doc": "Adam's step size"},
            "batch_size": {
                "type": "int",
                "default": 16,
                "min": 1,
                "max": 65536,
                "doc": "inputs per task and step",
            },
            "max_steps": {"type": "int", "default": 1000, "min": 0, "max": 1000000, "doc": "Adam steps"},
        },
    },
]


# --------------------------------------------------------------------------- networks with routers


class RoutedLinear(nn.Module):
    """SMILE's layer: y = W0 x + b0 + Σ_i p_i (U_i S_iV_iᵀ x + Δb_i), p from r_i = ‖V_iᵀ x‖ (Tang et al.).

    ``gate`` ``[T·g, in]``, ``u`` ``[T, out, k]``, ``svh`` ``[T, k, in]``, ``offset`` ``[T, out]`` or None. The
    ``top_k`` experts with the largest softmax(r) share the weight 1; with one expert it is sent everything.
    """

    gate: Tensor
    u: Tensor
    svh: Tensor
    offset: Tensor | None

    def __init__(self, linear: nn.Linear, tensors: Mapping[str, Tensor], top_k: int) -> None:
        super().__init__()
        self.linear = linear
        for name in ("gate", "u", "svh", "offset"):
            self.register_buffer(name, tensors.get(name), persistent=False)
        self.top_k = min(top_k, len(self.u))

    @property
    def weight(self) -> Tensor:
        """The shared part's: what attention layers that do not call their projection get to see."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def routing(self, x: Tensor) -> Tensor:
        """Weights of the experts ``[..., T]`` for ``x`` ``[..., in]``."""
        scores = functional.linear(x, self.gate)
        scores = scores.view(*x.shape[:-1], len(self.u), -1).norm(dim=-1)
        chosen, index = scores.softmax(dim=-1).topk(self.top_k, dim=-1)
        return torch.zeros_like(scores).scatter_(-1, index, chosen / chosen.sum(dim=-1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.routing(x)
        inner = torch.einsum("...i,tki->...tk", x, self.svh) * weights[..., None]
        y: Tensor = self.linear(x) + torch.einsum("...tk,tok->...o", inner, self.u)
        return y if self.offset is None else y + weights @ self.offset


class Smile(FusionBenchMerge):
    """Upscaled by FusionBench, served by ``RoutedLinear``: ``extra`` holds ``<layer>|gate``, ``|u``, ``|svh``, ``|offset``.

    ``shared`` is the part that all tokens pass: the base (with ``average_experts`` other modules than
    linear ones are averages).
    """

    target = "method.smile_upscaling.smile_upscaling:SmileUpscalingAlgorithm"
    fixed: ClassVar[Mapping[str, Any]] = {
        "full_matrices": False,
        "upscaling_accelerator": None,
        "model_path": None,
    }

    def arguments(self, ctx: MergeContext) -> dict[str, Any]:
        return {**super().arguments(ctx), "device": str(ctx.device)}

    def run(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Any:
        count = min(self.parameters["top_k"], len(experts))
        built = find(self.target)(**{**self.arguments(ctx), "top_k": count})
        return execute(built, pool(self.networks(base, experts, ctx)), ctx)

    def read(self, result: Any, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        layer = find("models.smile_moe.linear_from_module:SmileMoELinear")
        extra: dict[str, Tensor] = {}
        for name, module in result.named_modules():
            if isinstance(module, layer):
                for key, tensor in _routed(module).items():
                    extra[f"{name}|{key}"] = tensor.detach().to(ctx.device, copy=True)
        kept = {n.replace(".pretrained_model.", "."): t for n, t in result.state_dict().items()}
        return Merged(harvest(kept, base, experts, self.name), extra=extra, info=self.facts())

    def network(self, backbone: Backbone, merged: Merged, task: str) -> nn.Module:
        network = load_network(backbone, merged.shared)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in merged.extra.items():
            layer, _, key = name.rpartition("|")
            parts.setdefault(layer, {})[key] = tensor
        for layer, tensors in parts.items():
            linear = network.get_submodule(layer)
            assert isinstance(linear, nn.Linear)
            moved = {k: t.to(linear.weight.device, linear.weight.dtype) for k, t in tensors.items()}
            network.set_submodule(layer, RoutedLinear(linear, moved, self.parameters["top_k"]))
        return network.eval()


def _routed(module: Any) -> dict[str, Tensor]:
    """The tensors of one upscaled layer, experts stacked."""
    found = {
        "gate": module.gate.weights,
        "u": torch.stack([e.u for e in module.experts]),
        "svh": torch.stack([e.svh for e in module.experts]),
    }
    if module.experts[0].bias is not None:
        found["offset"] = torch.stack([e.bias for e in module.experts])
    return found


class WeMoe(FusionBenchMerge):
    """Tang et al., with FusionBench's MoE module and adaptation loop; the network around it is built here.

    FusionBench's own construction fails (its task arithmetic refuses the networks it gets). ``shared``
    holds the base's MLPs, ``extra`` ``<mlp>|gate...`` and ``<mlp>|task_vectors...``. Blocks are taken to
    be handed ``[N, tokens, d]``.
    """

    target = "method.we_moe.we_moe:WeightEnsemblingMoEAlgorithm"
    fixed: ClassVar[Mapping[str, Any]] = {"optimizer": "adam", "use_grad_accumulate": True}

    def run(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Any:
        built = self._adaptation(base, experts, ctx)
        return execute(built, pool(self.networks(base, experts, ctx)), ctx)

    def _adaptation(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Any:
        """FusionBench's loop with what it leaves to subclasses: the network, the batches, the logits."""
        method, given = self, self.parameters
        streams = {
            place(i): Stream(e.task, ctx.views[e.task], given["batch_size"], ctx)
            for i, e in enumerate(experts)
        }

        class Adaptation(find(self.target)):  # type: ignore[misc]
            def construct_moe_model(self) -> nn.Module:
                return method._upcycled(self.modelpool, base, ctx)

            construct_moe_model_sharedgate = construct_moe_model

            def get_shuffled_test_loader_iter(self, task: str) -> Iterator[Any]:
                return iter([streams[task].inputs(streams[task].draw())])

            def compute_logits(self, module: nn.Module, batch: Any, task: str) -> Any:
                return streams[task].outputs(Model(ctx.backbone, module), batch)

            def load_checkpoint(self, model: Any, checkpoint: Any) -> None:
                raise ContractError(f"{method.name}: adapts the pool's networks, never a checkpoint")

            def save_checkpoint(self, model: Any, checkpoint: Any) -> None:
                """The step's artifact is the only thing kept."""

        return Adaptation(configuration({**self.arguments(ctx)}))

    def _upcycled(self, models: Any, base: Weights, ctx: MergeContext) -> nn.Module:
        """Task arithmetic of the pool's networks, with the MLPs in place of which routers choose."""
        network = models.load_pretrained_model()
        members = list(models.models())
        layers = mlps(ctx.backbone, base)
        own = copy.deepcopy({path: network.get_submodule(path) for path in layers})
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                total = sum(m.get_parameter(name) - parameter for m in members)
                parameter.add_(total, alpha=self.parameters["init_lambda"])
        network.requires_grad_(False)
        gate = self._gate(max(layers.values()), len(members))
        for path, width in layers.items():
            experts = [m.get_submodule(path) for m in members]
            moe = self._moe(width, own[path], experts, self.parameters["batch_reduce"], gate)
            network.set_submodule(path, moe)
        return network  # type: ignore[no-any-return]

    def _gate(self, width: int, count: int) -> nn.Module | None:
        """The router that all blocks share, if they do."""
        return None

    def _moe(
        self, width: int, mlp: nn.Module, experts: Sequence[nn.Module], batch_reduce: bool,
        gate: nn.Module | None,
    ) -> nn.Module:  # fmt: skip
        """FusionBench's module; takes over ``mlp`` and turns ``experts`` into their task vectors."""
        module: nn.Module = find("models.we_moe:WeightEnsemblingMoE")(
            hidden_size=width, base_model=mlp, expert_models=list(experts), batch_first=True,
            init_lambda=self.parameters["init_lambda"], batch_reduce=batch_reduce,
            router_hidden_layers=self.parameters["router_hidden_layers"],
        )  # fmt: skip
        return module

    def read(self, result: Any, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        found: dict[str, Tensor] = {}
        extra: dict[str, Tensor] = {}
        layers = mlps(ctx.backbone, base)
        for name, tensor in result.state_dict().items():
            path = next((p for p in layers if name.startswith(f"{p}.")), "")
            rest = name[len(path) + 1 :]
            if path and not rest.startswith("base_model."):
                extra[f"{path}|{rest}"] = tensor.detach().to(ctx.device, copy=True)
            else:
                found[name.replace(f"{path}.base_model.", f"{path}.") if path else name] = tensor
        return Merged(harvest(found, base, experts, self.name), extra=extra, info=self.facts())

    def network(self, backbone: Backbone, merged: Merged, task: str) -> nn.Module:
        network = load_network(backbone, merged.shared)
        layers = mlps(backbone, merged.shared)
        count = 1 + max(
            int(n.split("|task_vectors.")[1].split(".")[0]) for n in merged.extra if "|task_" in n
        )
        with sandbox(Context(torch.device("cpu"), 0)):
            gate = self._gate(max(layers.values()), count)
            for path, width in layers.items():
                start = f"{path}|"
                own = {n.removeprefix(start): t for n, t in merged.extra.items() if n.startswith(start)}
                mlp = network.get_submodule(path).requires_grad_(True)
                module = self._moe(width, mlp, [copy.deepcopy(mlp) for _ in range(count)], False, gate)
                module.load_state_dict({**{f"base_model.{n}": t for n, t in mlp.state_dict().items()}, **own})
                network.set_submodule(path, module)
        return network.eval()


class EWeMoe(WeMoe):
    """Shen et al.: the router is shared by all blocks, the MLPs' task vectors keep their largest entries."""

    target = "method.sparse_we_moe.sparse_we_moe:SparseWeightEnsemblingMoEAlgorithm"
    fixed: ClassVar[Mapping[str, Any]] = {
        "optimizer": "adam", "use_grad_accumulate": False, "shared_gate": True, "post_sparse_gate": False,
    }  # fmt: skip

    def _gate(self, width: int, count: int) -> nn.Module | None:
        gate: nn.Module = find("models.sparse_we_moe:construct_weight_ensembling_gate")(
            width, count, init_lambda=self.parameters["init_lambda"],
            num_hidden_layers=self.parameters["router_hidden_layers"],
        )  # fmt: skip
        return gate

    def _moe(
        self, width: int, mlp: nn.Module, experts: Sequence[nn.Module], batch_reduce: bool,
        gate: nn.Module | None,
    ) -> nn.Module:  # fmt: skip
        module: nn.Module = find("models.sparse_we_moe:SparseWeightEnsemblingMoE_ShardGate")(
            hidden_size=width, base_model=mlp, expert_models=list(experts), batch_first=True,
            batch_reduce=batch_reduce, sharedgate=gate, tv_prune_ratio=self.parameters["tv_prune_ratio"],
        )  # fmt: skip
        return module


def mlps(backbone: Backbone, base: Weights) -> dict[str, int]:
    """``{module path of each block's MLP: width of what it is handed}``; ContractError if it is no module."""
    found: dict[str, int] = {}
    anatomy = backbone.anatomy()
    for block, inside in zip(anatomy.blocks, block_paths(anatomy), strict=True):
        names = [linear.weight.split(".") for linear in (block.mlp.up, block.mlp.down)]
        path = ".".join(
            a for a, b in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(*names, strict=False))
        )
        if path == inside:
            raise ContractError(f"block '{inside}': its MLP is not a module of its own")
        found[path] = base[block.mlp.up.weight].shape[1]
    return found
