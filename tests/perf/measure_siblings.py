"""Whether training sibling experts together is faster than one after another: the same network, other rows.

    python tests/perf/measure_siblings.py --siblings 4 8

One optimizer step of ``mini/vit`` with the batch of the quickstart's recipe, one thread on a CPU: forward, backward
and AdamW. ``single`` does the siblings one after another; ``vmap`` maps the gradient over stacked parameters
(torch.func); ``grouped`` gives every sibling a block of a batched matrix product, by hand, for the linear maps of the
blocks alone, which is what could be gained at best. All in one run, in turns; the best of each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from mergesec.contracts import load_network
from mergesec.planning.catalog import load_catalog

CLASSES = 10


def _inputs(count: int, batch: int) -> tuple[list[torch.nn.Module], Tensor, Tensor, Tensor]:
    entry = load_catalog().get("backbone", "mini/vit")
    backbone = entry.create(entry.card.bind("mini/vit", {}))
    networks = [load_network(backbone, backbone.base_weights()).train() for _ in range(count)]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, batch, 3, 32, 32, generator=generator)
    width = backbone.features(networks[0], images[0]).shape[1]
    heads = torch.randn(count, CLASSES, width, generator=generator)
    return networks, images, torch.randint(CLASSES, (count, batch), generator=generator), heads


def _loss(features: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        16 * torch.nn.functional.normalize(features, dim=-1) @ head.T, targets
    )


def single(count: int, batch: int) -> Callable[[], None]:
    networks, images, targets, heads = _inputs(count, batch)
    optimizers = [torch.optim.AdamW(n.parameters(), fused=True) for n in networks]

    def step() -> None:
        for i, (network, optimizer) in enumerate(zip(networks, optimizers, strict=True)):
            optimizer.zero_grad(set_to_none=True)
            _loss(network(images[i]), heads[i], targets[i]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return step


def mapped(count: int, batch: int) -> Callable[[], None]:
    networks, images, targets, heads = _inputs(count, batch)
    parameters, buffers = stack_module_state(networks)
    template = networks[0]
    optimizer = torch.optim.AdamW(list(parameters.values()), fused=True)

    def objective(
        own: dict[str, Tensor], rest: dict[str, Tensor], x: Tensor, y: Tensor, head: Tensor
    ) -> Tensor:
        return _loss(functional_call(template, (own, rest), (x,)), head, y)

    together = vmap(grad(objective), randomness="different")

    def step() -> None:
        plain = {name: p.detach() for name, p in parameters.items()}
        for name, found in together(plain, buffers, images, targets, heads).items():
            parameters[name].grad = found
        optimizer.step()

    return step


def linears(count: int, batch: int, grouped: bool) -> Callable[[], None]:
    """Forward and backward of the blocks' linear maps alone."""
    networks, *_ = _inputs(count, batch)
    shapes = [tuple(p.shape) for n, p in networks[0].named_parameters() if p.ndim == 2 and "pos" not in n]
    tokens = 16 * batch  # an image has so many
    work = [
        (torch.randn(count, tokens, ins), torch.randn(count, ins, outs), torch.randn(count, tokens, outs))
        for outs, ins in shapes
    ]

    def step() -> None:
        for x, weight, slope in work:
            if grouped:
                torch.bmm(x, weight), torch.bmm(slope, weight.mT), torch.bmm(x.mT, slope)
            else:
                for i in range(count):
                    x[i] @ weight[i], slope[i] @ weight[i].T, x[i].T @ slope[i]

    return step


def best(steps: dict[str, Callable[[], None]], times: int) -> dict[str, float]:
    found = dict.fromkeys(steps, float("inf"))
    for step in steps.values():
        step()
    for _ in range(times):
        for name, step in steps.items():
            start = time.process_time()
            step()
            found[name] = min(found[name], time.process_time() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--siblings", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for count in options.siblings:
        steps = {"single": single(count, options.batch), "vmap": mapped(count, options.batch)}
        steps |= {
            "linears": linears(count, options.batch, False),
            "grouped": linears(count, options.batch, True),
        }
        found = best(steps, options.times)
        ratios = {"vmap": found["single"] / found["vmap"], "grouped": found["linears"] / found["grouped"]}
        print(json.dumps({"siblings": count, "seconds": found, "times as fast": ratios}))


if __name__ == "__main__":
    main()
