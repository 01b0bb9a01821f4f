"""FusionBench's merges on data: RegMean++ on tuning rows, gossip merging on unlabelled inputs."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mergesec.contracts import ContractError, Expert, MergeContext, Model, Weights
from mergesec_methods.fusionbench._adapter import FusionBenchMerge, configuration, execute, find, place, pool
from mergesec_methods.merging._adaptation import Stream
from mergesec_methods.merging._blocks import Call, block_paths

CARDS = [
    {
        "name": "fusionbench/regmean_plusplus",
        "kind": "merging",
        "class": "RegMeanPlusPlus",
        "version": "1",
        "title": "RegMean++",
        "paper": "Nguyen et al., RegMean++: enhancing effectiveness and generalization of regression mean, 2025",
        "url": "https://arxiv.org/abs/2508.03121",
        "summary": "RegMean block by block, each on the activations of the blocks merged before it",
        "output": "static",
        "data": "tuning",
        "modalities": ["image", "text"],
        "seeded": True,
        "depends": ["fusion-bench"],
        "requires": {"fusion_bench": "mergesec[fusionbench]"},
        "parameters": {
            "num_regmean_examples": {
                "type": "int",
                "default": 256,
                "min": 1,
                "max": 1000000,
                "doc": "tuning rows per task; all where there are fewer",
            },
            "reduce_non_diagonal_ratio": {
                "type": "float",
                "default": 0.95,
                "min": 0.0,
                "max": 1.0,
                "doc": "the Gram matrices' entries off the diagonal are multiplied by this",
            },
            "batch_size": {"type": "int", "default": 32, "min": 1, "max": 65536, "doc": "rows per batch"},
        },
    },
    {
        "name": "fusionbench/gossip",
        "kind": "merging",
        "class": "Gossip",
        "version": "1",
        "title": "Layer-wise gossip merging",
        "paper": "FusionBench, layer_wise_gossip (no paper named there)",
        "summary": "layer-wise AdaMerging of neighbours on a ring, in rounds; then the average of all",
        "output": "static",
        "data": "tuning",
        "modalities": ["image", "text"],
        "experts": [2, 0],
        "seeded": True,
        "depends": ["fusion-bench"],
        "requires": {"fusion_bench": "mergesec[fusionbench]"},
        "trial": {"gossip_max_steps": 1, "max_steps": 1, "batch_size": 2},
        "parameters": {
            "lr": {"type": "float", "default": 0.001, "min": 0.0, "max": 10.0, "doc": "Adam's step size"},
            "init_values": {
                "type": "float",
                "default": 0.3,
                "min": 0.0,
                "max": 10.0,
                "doc": "coefficients at the start of each adaptation",
            },
            "batch_size": {
                "type": "int",
                "default": 16,
                "min": 1,
                "max": 65536,
                "doc": "inputs per task and step",
            },
            "max_steps": {
                "type": "int",
                "default": 400,
                "min": 0,
                "max": 1000000,
                "doc": "Adam steps per expert and round",
            },
            "gossip_max_steps": {"type": "int", "default": 20, "min": 1, "max": 10000, "doc": "rounds"},
            "improve_dataset": {
                "type": "bool",
                "default": True,
                "doc": "adapt on the inputs of the tasks heard of so far only, not of all",
            },
        },
    },
]


class RegMeanPlusPlus(FusionBenchMerge):
    """Nguyen et al., with FusionBench's loop over the blocks; what lies outside them is averaged.

    FusionBench's own class for CLIP fails on transformers 5, and leaves the last norm at the base's value.
    """

    def run(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Any:
        models = pool(self.networks(base, experts, ctx))
        rows = {place(i): self._batches(e.task, ctx) for i, e in enumerate(experts)}
        models.load_train_dataset = rows.__getitem__
        return execute(self._loop(ctx), models, ctx)

    def _batches(self, task: str, ctx: MergeContext) -> list[Any]:
        """Raw inputs of random tuning rows of one task, in batches on the device."""
        view = ctx.views[task]
        generator = ctx.generator(zlib.crc32(f"rows/{task}".encode()))
        order = torch.randperm(len(view.tuning), generator=generator)[
            : self.parameters["num_regmean_examples"]
        ]
        parts = torch.split(order, self.parameters["batch_size"])
        return [view.task.batch(view.tuning, part, ctx.device).inputs for part in parts]

    def _loop(self, ctx: MergeContext) -> Any:
        """FusionBench's loop with what it leaves to subclasses: where the blocks are and how they run."""
        blocks = block_paths(ctx.backbone.anatomy())
        inside = tuple(f"{name}." for name in blocks)

        class Loop(find("method.regmean_plusplus.regmean_plusplus:RegMeanAlgorithmPlusPlus")):  # type: ignore[misc]
            def get_layers(self, model: nn.Module) -> list[nn.Module]:
                return [model.get_submodule(name) for name in blocks]

            def merge_embedding_layer(self, models_to_merge_dict: dict[str, nn.Module]) -> dict[str, Tensor]:
                states = [m.state_dict() for m in models_to_merge_dict.values()]
                names = [n for n in states[0] if not n.startswith(inside)]
                return {n: torch.stack([s[n] for s in states]).mean(dim=0) for n in names}

            def update_merged_params_dict(
                self, merged_params_dict: dict[str, Tensor], new_merged_params: dict[str, Tensor],
                layer_idx: int,
            ) -> dict[str, Tensor]:  # fmt: skip
                new = {f"{blocks[layer_idx]}.{n}": t for n, t in new_merged_params.items()}
                return {**merged_params_dict, **new}

            def get_input_for_first_layer(self, model: nn.Module, batches: list[Any]) -> list[Call]:
                return calls_of(model.get_submodule(blocks[0]), Model(ctx.backbone, model.eval()), batches)

            def layer_batches_forward(self, layer: nn.Module, calls: list[Call]) -> list[Call]:
                return [passed_on(layer, call) for call in calls]

            def get_regmean_weights(
                self, name: str, layer: nn.Module, batches_input: list[Call],
                linear_modules_to_merge: dict[str, nn.Module],
            ) -> dict[str, Tensor]:  # fmt: skip
                return second_moments(layer, batches_input, linear_modules_to_merge)

        return Loop(
            num_regmean_examples=self.parameters["num_regmean_examples"],
            reduce_non_diagonal_ratio=self.parameters["reduce_non_diagonal_ratio"],
            exclude_param_names_regex=[], weight_transpose=True,
        )  # fmt: skip


def calls_of(block: nn.Module, model: Model, batches: Sequence[Any]) -> list[Call]:
    """What ``block`` is called with while ``model`` computes the features of each batch."""
    calls: list[Call] = []
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    for batch in batches:
        model.features(batch)
    handle.remove()
    if len(calls) != len(batches) or not all(args for args, _ in calls):
        raise ContractError("the first block is not called once per batch with its hidden states first")
    return calls


def passed_on(layer: nn.Module, call: Call) -> Call:
    """The same call for the next block: the layer's output in place of its hidden states."""
    args, kwargs = call
    output = layer(*args, **kwargs)
    return (output[0] if isinstance(output, tuple) else output, *args[1:]), kwargs


def second_moments(
    layer: nn.Module, calls: Sequence[Call], linears: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """E[x xᵀ] ``[in, in]`` over the rows that each linear map of ``layer`` is handed."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def watch(name: str, linear: nn.Module) -> Any:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2)
            sums[name] = sums.get(name, 0.0) + x.T @ x
            rows[name] = rows.get(name, 0) + len(x)

        return linear.register_forward_pre_hook(note)

    handles = [watch(name, linear) for name, linear in linears.items()]
    for call in calls:
        passed_on(layer, call)
    for handle in handles:
        handle.remove()
    return {name: total / rows[name] for name, total in sums.items()}


class Gossip(FusionBenchMerge):
    """FusionBench's rounds of layer-wise AdaMerging between neighbours; the average network of the last round."""

    def run(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Any:
        models = find("modelpool:CLIPVisionModelPool")(self.networks(base, experts, ctx))
        return execute(self._loop(experts, ctx), models, ctx)[-1]["model"]

    def _loop(self, experts: Sequence[Expert], ctx: MergeContext) -> Any:
        """FusionBench's loop with what it leaves to subclasses: the batches and the logits."""
        streams = {
            place(i): Stream(e.task, ctx.views[e.task], self.parameters["batch_size"], ctx)
            for i, e in enumerate(experts)
        }

        class Loop(find("method.gossip.layer_wise_gossip:LayerWiseGossipAlgorithm")):  # type: ignore[misc]
            def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
                """Nothing: it would ask for a logger."""

            def get_shuffled_test_loader_iter(self, task: str) -> Iterator[tuple[Any]]:
                return iter([(streams[task].inputs(streams[task].draw()),)])

            def compute_logits(self, module: nn.Module, images: Any, task: str) -> Any:
                return streams[task].outputs(Model(ctx.backbone, module), images)

        fixed = {
            "weights": None, "optimizer": "adam", "clamp_weights": False, "tie_weights": True, "strict": False,
            "gossip_skip_adamerging": False, "accuracy_test_interval": 0, "topo": "ring",
        }  # fmt: skip
        return Loop(configuration({**self.parameters, **fixed}))
