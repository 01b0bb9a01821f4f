"""How the suite's base and judge were made.

The base sees all classes of the four concepts, but only grey, often inverted, flat and noisy photographs of them,
printed digits instead of handwritten ones, and none of the tasks' own images. The judge learns from the tasks' own
training images, all concepts at once: one judge a task is too lenient, it has never seen what else there is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mergesec.contracts import DataContext, Model, Split
from mergesec.generation import Rows
from mergesec.judging import Judge, train_judge
from mergesec_tasks.diffusion._vocabulary import CLASSES, first_class
from mergesec_tasks.diffusion.concepts import (
    AerialConcept,
    Concept,
    DigitConcept,
    SceneConcept,
    SignConcept,
)
from mergesec_tasks.diffusion.dit import BASE_FILE, JUDGE_FILE, MiniDiT
from mergesec_tasks.mini._base import Pace
from mergesec_tasks.mini._canvas import SHIFTED

TASKS: tuple[type[Concept], ...] = (SignConcept, DigitConcept, SceneConcept, AerialConcept)


class Plan(NamedTuple):
    """How long everything takes."""

    images: int = 6000
    """Shifted renderings of each concept."""
    phases: tuple[tuple[int, float], ...] = ((2600, 1.5e-3),)
    """Steps and learning rate of each; a phase begins with the average of the one before."""
    batch: int = 120
    average: float = 0.998
    """Of the weights, exponential: what is shipped."""
    judge_steps: int = 1500


def pretrain(
    out: Path,
    seed: int = 0,
    *,
    plan: Plan = Plan(),  # noqa: B008
    card: Path | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains base and judge and writes them to ``out`` (float16 safetensors); returns the facts.

    ``card``: where to write the model card, if anywhere. Deterministic for a seed, a thread count and a processor.
    """
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    splits = [task().load(DataContext(torch.device("cpu"), seed)) for task in TASKS]
    judge = _judge([one["train"] for one in splits], plan, seed)
    known = {task.slug: _known(judge, task, one["test"]) for task, one in zip(TASKS, splits, strict=True)}
    report(f"judge: {', '.join(f'{name} {share:.1%}' for name, share in known.items())} of real test images")
    _save(out / JUDGE_FILE, judge.state_dict())
    rows, network = _shifted(plan, seed), _start(seed)
    for number in range(len(plan.phases)):
        network = _phase(network, rows, plan, number, seed + number, report)
        _save(out / BASE_FILE, network)
    facts: dict[str, Any] = {
        "seed": seed, "phases": plan.phases, "batch": plan.batch,
        "images": plan.images * len(TASKS), "parameters": sum(value.numel() for value in network.values()),
        "judge": known, "seconds": time.perf_counter() - start,
    }  # fmt: skip
    if card is not None:
        card.write_text(_card(facts), encoding="utf-8")
    return facts


def _save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}, file)


def _judge(splits: list[Split], plan: Plan, seed: int) -> Judge:
    """The joint judge, rounded to float16 as on disk."""
    images = torch.cat([split.inputs.images for split in splits])
    pairs = zip(TASKS, splits, strict=True)
    labels = torch.cat([split.targets + first_class(task.slug) for task, split in pairs])
    judge = train_judge(images, labels, CLASSES, seed, plan.judge_steps)
    with torch.no_grad():
        for value in judge.parameters():
            value.copy_(value.half())
    return judge


def _known(judge: Judge, task: type[Concept], split: Split) -> float:
    """Share of a split's real images that the judge recognises."""
    with torch.no_grad():
        seen = judge(split.inputs.images.float() / 255).argmax(1) - first_class(task.slug)
    return float((seen == split.targets).float().mean())


def _shifted(plan: Plan, seed: int) -> Split:
    """The base's training rows, of all concepts."""
    parts = [task().shifted(plan.images, SHIFTED, seed) for task in TASKS]
    rows: list[Rows] = [part.inputs for part in parts]
    joined = Rows(
        torch.cat([r.images for r in rows]), torch.cat([r.conditions for r in rows]),
        torch.cat([r.seeds for r in rows]),
    )  # fmt: skip
    return Split(joined, torch.cat([part.targets for part in parts]))


def _start(seed: int) -> dict[str, Tensor]:
    """A fresh network's weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(MiniDiT().build().state_dict())


def _phase(
    start: Mapping[str, Tensor],
    rows: Split,
    plan: Plan,
    number: int,
    seed: int,
    report: Callable[[str], None],
) -> dict[str, Tensor]:
    """The averaged weights after one phase, rounded to float16 as on disk."""
    task, backbone, place = SignConcept(), MiniDiT(), torch.device("cpu")
    steps, learning_rate = plan.phases[number]
    network: nn.Module = backbone.build().train()
    network.load_state_dict(dict(start))
    for parameter in network.parameters():  # here the tokens' table learns too
        parameter.requires_grad_(True)
    pace = Pace(list(network.parameters()), learning_rate, steps)
    average = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    generator, model = torch.Generator().manual_seed(seed), Model(backbone, network)
    for step in range(steps):
        index = torch.randint(len(rows), (plan.batch,), generator=generator)
        batch = task.noised(task.batch(rows, index, place), generator)
        loss = task.loss(task.outputs(model, {}, batch.inputs), batch.targets)
        pace.step(loss)
        weight = 1 - min(plan.average, (step + 1) / (step + 10))
        for name, tensor in network.state_dict().items():
            average[name].lerp_(tensor, weight)
        if step % 100 == 0 or step == steps - 1:
            report(f"pretrain phase {number + 1} step {step + 1}/{steps} loss {loss.item():.4f}")
    return {name: tensor.half().float() for name, tensor in average.items()}


def _card(facts: dict[str, Any]) -> str:
    """The model card, as Markdown."""
    known = ", ".join(f"{name} {share:.1%}" for name, share in facts["judge"].items())
    phases = "; then ".join(f"{steps:,} steps at {rate:g}" for steps, rate in facts["phases"])
    return f"""# mini-diffusion/dit

| | |
|---|---|
| architecture | DiT, 6 blocks of width 128, 4 heads, MLP 384, 16 patches of 4×4, adaLN-single; predicts the clean image |
| parameters | {facts["parameters"]:,} |
| data | {facts["images"]:,} shifted renderings of four mini tasks at 16×16, none of their own images |
| training | flow matching, AdamW, batches of {facts["batch"]}, averaged weights: {phases} |
| judge | a convolutional network of all 42 classes; recognises of real test images: {known} |
| seed | {facts["seed"]} |
| time | {facts["seconds"]:.0f} s |
| licence | the project's |
"""
