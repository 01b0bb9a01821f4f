"""Merge methods of FusionBench that the rest of this catalogue lacks, run by FusionBench itself.

One class per name; what all of them share, and what is done to keep FusionBench from touching its
surroundings, is in ``_fusionbench``. Here are those that need no data; ``fusionbench_data`` and
``fusionbench_routers`` have the others. Names of FusionBench that do not run in the installed release
are nowhere; docs/methods/merging.md lists them with the reason.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from mergesec.contracts import ContractError, Expert, MergeContext, Merged, Weights
from mergesec.tensorwise import check_experts
from mergesec.weights import mergeable
from mergesec_methods.fusionbench._adapter import (
    MERGED,
    FusionBenchMerge,
    carrier,
    draw_seed,
    everyone,
    execute,
    find,
    fresh_network,
    harvest,
    matrices,
    place,
    pool,
    sandbox,
    uncarried,
)

CARDS = [
    {
        "name": "fusionbench/doge_ta",
        "kind": "merging",
        "class": "DogeTa",
        "version": "1",
        "title": "DOGE task arithmetic",
        "paper": "Wei et al., Modeling multi-task model merging as adaptive projective gradient descent, ICML 2025",
        "url": "https://arxiv.org/abs/2501.01230",
        "summary": "learns one shared correction of the blocks' task vectors outside their common subspace",
        "output": "static",
        "data": "none",
        "modalities": ["image", "text"],
        "seeded": False,
        "depends": ["fusion-bench"],
        "requires": {"fusion_bench": "mergesec[fusionbench]"},
        "parameters": {
            "subspace": {
                "type": "int",
                "default": 6,
                "min": 1,
                "max": 65536,
                "doc": "the shared subspace is 1/subspace of a matrix's rank",
            },
            "K": {
                "type": "float",
                "default": 30.0,
                "min": 0.0,
                "max": 99.9,
                "doc": "per cent of the entries kept by magnitude (up to 1: a share; FusionBench cannot keep all)",
            },
            "lamda": {
                "type": "float",
                "default": 0.07,
                "min": 0.0,
                "max": 100.0,
                "doc": "a matrix's coefficient is lamda over the norm of its task vector",
            },
            "steps": {
                "type": "int",
                "default": 400,
                "min": 0,
                "max": 100000,
                "later": True,
                "doc": "Adam steps per matrix (fixed in FusionBench)",
            },
        },
        "trial": {"steps": 20},
    },
    {
        "name": "fusionbench/svc",
        "kind": "merging",
        "class": "Svc",
        "version": "1",
        "title": "Singular value calibration",
        "paper": "When shared knowledge hurts: spectral over-accumulation in model merging, 2026",
        "url": "https://arxiv.org/abs/2602.05536",
        "summary": "scales down the singular values that a merge counted once per task",
        "output": "static",
        "data": "tuning",
        "modalities": ["image", "text"],
        "seeded": False,
        "wraps": "base_method",
        "depends": ["fusion-bench"],
        "requires": {"fusion_bench": "mergesec[fusionbench]"},
        "parameters": {
            "base_method": {
                "type": "merging",
                "default": "task_arithmetic",
                "doc": "the merge that is calibrated: its name, or {name: ..., parameter: value}",
            },
            "alpha": {
                "type": "float",
                "default": 0.1,
                "min": 0.000001,
                "max": 100.0,
                "doc": "lower bound of a projection coefficient; FusionBench takes 1.0 after TSV-M and WUDI",
            },
        },
    },
    {
        "name": "fusionbench/trust_region",
        "kind": "merging",
        "class": "TrustRegion",
        "version": "1",
        "title": "Task arithmetic in the trust region, data-free",
        "paper": "Sun et al., Task arithmetic in trust region, ICLR 2025",
        "url": "https://openreview.net/forum?id=q3ztjJRQuJ",
        "summary": "task arithmetic without the entries where task vectors conflict most",
        "output": "static",
        "data": "none",
        "modalities": ["image", "text"],
        "seeded": False,
        "depends": ["fusion-bench"],
        "requires": {"fusion_bench": "mergesec[fusionbench]"},
        "parameters": {
            "scaling_factor": {
                "type": "float",
                "default": 0.3,
                "min": 0.0,
                "max": 10.0,
                "doc": "scaling coefficient λ",
            },
            "threshold_quantile": {
                "type": "float",
                "default": 0.99,
                "min": 0.0,
                "max": 1.0,
                "doc": "share of the entries, those of least conflict, that is kept",
            },
        },
    },
    {
        "name": "fusionbench/opcm",
        "kind": "merging",
        "class": "Opcm",
        "version": "1",
        "title": "OPCM",
        "paper": "Tang et al., Merging models on the fly without retraining, 2025",
        "url": "https://arxiv.org/abs/2501.09522",
        "summary": "one expert after the other, each projected off what is already merged",
        "output": "static",
        "data": "none",
        "modalities": ["image", "text"],
        "seeded": True,
        "depends": ["fusion-bench"],
        "requires": {"fusion_bench": "mergesec[fusionbench]"},
        "parameters": {
            "alpha": {
                "type": "float",
                "default": 0.5,
                "min": 0.0,
                "max": 1.0,
                "doc": "share of the spectrum's sum that the projection protects",
            },
            "shuffle_order": {"type": "bool", "default": True, "doc": "experts in random order"},
        },
    },
    {
        "name": "fusionbench/dop",
        "kind": "merging",
        "class": "Dop",
        "version": "1",
        "title": "Dual projections",
        "paper": "Continual model merging without data: dual projections for balancing stability and plasticity, "
        "NeurIPS 2025",
        "summary": "one expert after the other, each matrix optimised between the two spans",
        "output": "static",
        "data": "none",
        "modalities": ["image", "text"],
        "seeded": True,
        "depends": ["fusion-bench"],
        "requires": {"fusion_bench": "mergesec[fusionbench]"},
        "trial": {"num_steps": 5},
        "parameters": {
            "lr": {"type": "float", "default": 0.0001, "min": 0.0, "max": 10.0, "doc": "Adam's step size"},
            "num_steps": {
                "type": "int",
                "default": 200,
                "min": 0,
                "max": 1000000,
                "doc": "Adam steps per matrix and expert",
            },
            "mgda": {"type": "bool", "default": True, "doc": "weigh the two losses by their gradients"},
            "alpha": {
                "type": "float",
                "default": 0.8,
                "min": 0.0,
                "max": 1.0,
                "doc": "weight of what is already merged: at the start with mgda and ema, fixed without mgda",
            },
            "ema": {"type": "bool", "default": True, "doc": "moving average of the weights of mgda"},
            "ema_beta": {
                "type": "float",
                "default": 0.999,
                "min": 0.0,
                "max": 1.0,
                "doc": "decay of that average",
            },
            "svd_epsilon": {
                "type": "float",
                "default": 0.99999,
                "min": 0.0,
                "max": 1.0,
                "doc": "share of the spectrum's sum that spans the projections",
            },
            "svd_proj_space": {
                "type": "choice",
                "choices": ["u", "v", "uv"],
                "default": "uv",
                "doc": "project on left singular vectors, right ones or both",
            },
            "shuffle_order": {"type": "bool", "default": True, "doc": "experts in random order"},
        },
    },
    {
        "name": "fusionbench/continual_ties",
        "kind": "merging",
        "class": "ContinualTies",
        "version": "1",
        "title": "Continual TIES",
        "paper": "Tang et al., Merging models on the fly without retraining, 2025 (a baseline there)",
        "url": "https://arxiv.org/abs/2501.09522",
        "summary": "TIES of what is already merged with the next expert, one expert after the other",
        "output": "static",
        "data": "none",
        "modalities": ["image", "text"],
        "seeded": True,
        "depends": ["fusion-bench"],
        "requires": {"fusion_bench": "mergesec[fusionbench]"},
        "parameters": {
            "scaling_factor": {
                "type": "float",
                "default": 0.3,
                "min": 0.0,
                "max": 10.0,
                "doc": "scaling coefficient λ",
            },
            "threshold": {
                "type": "float",
                "default": 20.0,
                "min": 0.0,
                "max": 99.9,
                "doc": "per cent of the entries kept by trimming (up to 1: a share; FusionBench cannot keep all)",
            },
            "merge_func": {
                "type": "choice",
                "choices": ["sum", "mean", "max"],
                "default": "sum",
                "doc": "how agreeing entries are joined",
            },
            "shuffle_order": {"type": "bool", "default": True, "doc": "experts in random order"},
        },
    },
    {
        "name": "fusionbench/expo",
        "kind": "merging",
        "class": "Expo",
        "version": "1",
        "title": "ExPO",
        "paper": "Zheng et al., Weak-to-strong extrapolation expedites alignment, 2024",
        "url": "https://arxiv.org/abs/2404.16792",
        "summary": "the average of the experts, and a little further away from the base",
        "output": "static",
        "data": "none",
        "modalities": ["image", "text"],
        "seeded": False,
        "depends": ["fusion-bench"],
        "requires": {"fusion_bench": "mergesec[fusionbench]"},
        "parameters": {
            "extrapolation_factor": {
                "type": "float",
                "default": 0.1,
                "min": 0.0,
                "max": 10.0,
                "doc": "how far beyond the average, in units of its distance from the base",
            },
        },
    },
    {
        "name": "fusionbench/recombination",
        "kind": "merging",
        "class": "Recombination",
        "version": "1",
        "title": "Model recombination",
        "paper": "Hu et al., FedMR: federated learning via model recombination, 2023",
        "url": "https://arxiv.org/abs/2305.10730",
        "summary": "each tensor is that of an expert drawn at random",
        "output": "static",
        "data": "none",
        "modalities": ["image", "text"],
        "seeded": True,
        "depends": ["fusion-bench"],
        "requires": {"fusion_bench": "mergesec[fusionbench]"},
        "parameters": {},
    },
    {
        "name": "fusionbench/randes",
        "kind": "merging",
        "class": "Randes",
        "version": "1",
        "title": "RanDeS",
        "paper": "Zhou et al., RanDeS: randomized delta superposition for multi-model compression, 2025",
        "url": "https://arxiv.org/abs/2505.11204",
        "summary": "task vectors superposed under random signs; each task takes its own back out, with noise",
        "output": "per_task",
        "data": "none",
        "modalities": ["image", "text"],
        "seeded": True,
        "depends": ["fusion-bench"],
        "requires": {"fusion_bench": "mergesec[fusionbench]"},
        "parameters": {
            "mode": {
                "type": "choice",
                "choices": ["random_binary_diagonal_matrix", "random_rotation_matrix"],
                "default": "random_binary_diagonal_matrix",
                "doc": "what a matrix is multiplied by: random signs or a random rotation",
            },
            "scaling_factor": {
                "type": "float",
                "default": 0.5,
                "min": 0.0,
                "max": 10.0,
                "doc": "scaling coefficient of what is taken out",
            },
            "target_layer": {
                "type": "list",
                "default": ["mlp_w", "attn_w"],
                "doc": "which matrices of the blocks are superposed; all other task vectors are added up",
            },
            "different_across_layers": {
                "type": "bool",
                "default": True,
                "doc": "other random signs in each matrix",
            },
        },
    },
]


# --------------------------------------------------------------------------- on networks of the backbone


class TrustRegion(FusionBenchMerge):
    """Sun et al.: entries whose Σ_{i≠j} |τ_i| ⊙ |τ_j| is beyond the quantile are left at the base.

    The variant with gradients of training data is not offered: in 0.2.33 it files every task's
    gradients under the name of the last parameter, so that no conflict is found and the base comes back.
    """

    target = "method.trust_region.clip_task_arithmetic:TaskArithmeticWithTrustRegionForCLIP"
    fixed: ClassVar[Mapping[str, Any]] = {"zero_shot": True, "max_samples": 0, "batch_size": 1}


class Opcm(FusionBenchMerge):
    """Tang et al.: linear layers by projection, all else summed; rescaled to the mean norm of a task vector.

    Parameters that belong to no leaf module (a class token) stay those of the first expert, rescaled.
    """

    target = "method.opcm.opcm_general:OPCM"
    fixed: ClassVar[Mapping[str, Any]] = {"save_on_every_step": False}


class Dop(FusionBenchMerge):
    """Linear layers by optimisation, other modules averaged pairwise; what belongs to no leaf is the base's."""

    target = "method.dop.dop_general:DOPMerging"
    fixed: ClassVar[Mapping[str, Any]] = {"save_on_every_step": False}


class ContinualTies(FusionBenchMerge):
    """θ ← θ + λ TIES(θ − θ0, τ_i) for one expert after the other."""

    target = "method.opcm.ties_merging:ContinualTiesMergingForCLIP"
    fixed: ClassVar[Mapping[str, Any]] = {"save_on_every_step": False}

    def run(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Any:
        built = find(self.target)(**self.arguments(ctx))
        built._program = _NoProgram()
        return execute(built, pool(self.networks(base, experts, ctx)), ctx)


class _NoProgram:
    """Stands for FusionBench's program, whose task pool the class copies and then leaves alone."""

    def __init__(self) -> None:
        self.taskpool = self
        self._test_datasets: dict[str, Any] = {}


class Expo(FusionBenchMerge):
    """θ̄ + α (θ̄ − θ0), θ̄ the average of the experts: task arithmetic with λ = (1 + α) / T."""

    target = "method.linear.expo:ExPOAlgorithm"


class Recombination(FusionBenchMerge):
    """The first of the networks that FedMR would send back to its clients."""

    target = "method.model_recombination:ModelRecombinationAlgorithm"
    fixed: ClassVar[Mapping[str, Any]] = {"return_modelpool": False}


class Svc(FusionBenchMerge):
    """γ_r σ_r for σ_r of a merged task matrix, γ_r = T / Σ_i max(α, ⟨a_r, a_r^i⟩ / ‖a_r^i‖²), a_r^i = u_rᵀ τ_i.

    Every matrix is calibrated, embeddings included; what is not a matrix is as it was merged.
    """

    target = "method.singular_value_calibration.svc:SingularValueCalibration"

    def __init__(self, base_method: Any, alpha: float) -> None:
        super().__init__(alpha=alpha)

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        if ctx.inner is None:
            raise ContractError(f"{self.name}: the context names no merge to calibrate")
        check_experts(base, experts)
        inner = ctx.inner.merge(base, experts, ctx)
        with sandbox(ctx):
            built = find(self.target)(**self.parameters, accelerator=ctx.device)
            networks = self.networks(base, experts, ctx)
            networks[MERGED] = fresh_network(ctx.backbone, inner.shared)
            found = execute(built, pool(networks), ctx).state_dict()
        return Merged(harvest(found, base, experts, self.name), info={**inner.info, **self.facts()})


# --------------------------------------------------------------------------- on the blocks' matrices alone


class DogeTa(FusionBenchMerge):
    """Wei et al. on the matrices of the blocks; everything else is the base's.

    FusionBench picks CLIP's by name and takes 400 Adam steps for each, written into its loop; ``steps``
    gets there by a ``range`` of its module's own. A matrix that one expert left as it was has a
    coefficient of lamda / 0 and makes the merge fail.
    """

    target = "method.doge_ta.doge_ta:DOGE_TA_Algorithm"

    def arguments(self, ctx: MergeContext) -> dict[str, Any]:
        return {name: value for name, value in super().arguments(ctx).items() if name != "steps"}

    def run(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Any:
        module: Any = find("method.doge_ta:doge_ta")
        steps = self.parameters["steps"]
        module.range = lambda *ends: range(steps) if ends == (400,) else range(*ends)
        try:
            return super().run(base, experts, ctx)
        finally:
            del module.range

    def names(self, ctx: MergeContext) -> dict[str, str]:
        return {name: f"encoder_{i}_weight" for i, name in enumerate(matrices(ctx.backbone))}

    def networks(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> dict[str, nn.Module]:
        return {who: carrier(weights, self.names(ctx)) for who, weights in everyone(base, experts).items()}

    def read(self, result: Any, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        found = uncarried(result.state_dict(), self.names(ctx))
        return Merged(harvest(found, base, experts, self.name), info=self.facts())


class Randes(FusionBenchMerge):
    """Zhou et al.: task i's matrices are θ0 + λ (Σ_j τ_j ⊙ s_j) ⊙ s_i, all else is θ0 + λ Σ_j τ_j.

    FusionBench makes the signs' seed of ``hash(name)``, which differs between processes; here the name's
    CRC-32 takes its place.
    """

    target = "method.randes.task_arithmetic:SuperposedTaskArithmeticAlgorithm"
    fixed: ClassVar[Mapping[str, Any]] = {
        "joint_matrix_mode": "flatten_hstack", "rank": 1, "random_components": False, "shift_layers": 0,
        "absorber": "None", "debug": 0, "ms_mode": "average", "verbose": 0, "dropout_rate": 1,
    }  # fmt: skip

    def arguments(self, ctx: MergeContext) -> dict[str, Any]:
        return {**super().arguments(ctx), "random_seed": draw_seed(ctx) % 10**6}

    def names(self, base: Weights, ctx: MergeContext) -> dict[str, str]:
        roles = matrices(ctx.backbone)
        rest = [n for n, t in base.items() if mergeable(t) and n not in roles]
        return {
            **{n: f"{role}_{i}_weight" for i, (n, role) in enumerate(roles.items())},
            **{n: f"rest_{i}" for i, n in enumerate(rest)},
        }

    def networks(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> dict[str, nn.Module]:
        names = self.names(base, ctx)
        return {who: carrier(_padded(weights), names) for who, weights in everyone(base, experts).items()}

    def run(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Any:
        module: Any = find("method.randes:base_algorithm")
        module.hash = lambda name: zlib.crc32(name.encode())
        try:
            return super().run(base, experts, ctx)
        finally:
            del module.hash

    def read(self, result: Any, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        names, tasks = self.names(base, ctx), {}
        for index, expert in enumerate(experts):
            state = uncarried(result["models"][place(index)].state_dict(), names)
            found = {n: t.reshape(-1)[: base[n].numel()] for n, t in state.items()}
            tasks[expert.task] = harvest(found, base, experts, self.name)
        own = [n for n in matrices(ctx.backbone) if base[n].numel()]
        first = next(iter(tasks.values()))
        shared = {n: base[n] if n in own else t for n, t in first.items()}
        return Merged(shared, {t: {n: w[n] for n in own} for t, w in tasks.items()}, info=self.facts())


def _padded(weights: Weights) -> dict[str, Tensor]:
    """Vectors of at least two entries in place of what is not a matrix: FusionBench squeezes leading ones."""
    return {
        n: t if t.ndim == 2 and len(t) > 1 else functional.pad(t.reshape(-1), (0, int(t.numel() == 1)))
        for n, t in weights.items()
    }
