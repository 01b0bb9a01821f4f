"""Fingerprint: secret inputs whose answers survive merging. Black-box ownership proof, after MergePrint.

The owner cannot know what the expert will be merged with and takes the base as stand-in for everything else: the
*pseudo-merged* network ``θ_α = θ0 + α (θ − θ0)``. With k secret inputs x and k target classes y drawn uniformly:

1. OptI, before publishing, makes x such that little is left for the second step to change (``optimise``):
   ``ties``: x at which the base and ``θ_α`` with α = α_I are undecided between all classes, the least mean
   cross-entropy to the uniform distribution. A merge shifts the logits at x by λ times what the owner's and the
   others' task vectors do there, and with nothing to overcome in the base the answer does not depend on λ.
   ``target``, as published: x for which ``θ_α`` answers y while the base does not,
   ``CE(f_{θ_α}(x), y) + max(0, log K + 1 − CE(f_{θ0}(x), y))``.
   ``none``: noise.
2. OptP: few steps of Adam on θ for ``(CE(f_{θ_α}(x), y) / α + CE(f_θ(x), y)) / 2`` with α = α_P (as published, but for
   the second term, see below; 1/α makes both pull alike), plus ``penalty`` times the divergence KL(f_expert ‖ f_θ) on
   the owner's tuning inputs, which keeps the expert's answers.

Verification asks a suspect the k inputs (through the owner's head) and counts the targets. With ``ties`` and ``none`` y
is independent of x, so the hits of *any* network that was made without y are Binomial(k, 1/K) exactly and the p-value
is exact. With ``target`` it is not: x lies where the base is about to say y, and whatever moves away from the base
may say it. Measured on the mini suite (ten classes, 32 inputs): the expert of another task 11 hits, a merge of seven
others 19, p = 1e-11. (There the chance is raised to the base's own rate, which does not help: the base is held off y.)
MergePrint's long phrases may not suffer from this; single classes do, hence the default.

Source: Yamabe et al., "MergePrint", ACL 2025: its abstract and public reading notes of its method (α_I = 0.3,
α_P = 0.1, 18 steps of OptP). Adapted from generation to classification: images are free pixels in [0, 1], rounded to 8
bits, instead of tokens; texts are strings of the owner's words, improved one random word at a time (the paper: GCG,
which needs the gradient at the embeddings); k classes stand for one target phrase, since one class is too little
evidence. Added: ``ties``; the divergence term; α = 1 in OptP, for with α_P alone the published network itself
answered 16 of 32 targets that its diluted version answered 29 of. The paper's early stop is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesec.contracts import (
    ContractError,
    Defense,
    Model,
    ProtectContext,
    Protected,
    Verification,
    Weights,
    load_network,
)
from mergesec.weights import mergeable
from mergesec_methods.protection.defenses._marks import decide

CARD = {
    "name": "fingerprint",
    "kind": "defense",
    "class": "Fingerprint",
    "version": "1",
    "title": "Fingerprint (after MergePrint)",
    "paper": "Yamabe et al., MergePrint: Merge-Resistant Fingerprints for Robust Black-box Ownership "
    "Verification of Large Language Models, ACL 2025",
    "url": "https://arxiv.org/abs/2410.08604",
    "summary": "secret inputs and answers, optimised on the expert diluted with the base",
    "threat": "protection",
    "hooks": ["protect", "verify"],
    "knowledge": "the expert, the public base and the owner's tuning inputs; answers of a suspect when verifying",
    "data": "tuning",
    "modalities": ["image", "text"],
    "seeded": True,
    "trial": {"inputs": 16, "input_steps": 10, "steps": 3},
    "parameters": {
        "inputs": {"type": "int", "default": 64, "min": 1, "max": 4096, "doc": "secret inputs k"},
        "optimise": {
            "type": "choice",
            "default": "ties",
            "choices": ["ties", "target", "none"],
            "doc": "what inputs are optimised for; target is as published, but then strangers answer some targets",
        },
        "alpha_input": {
            "type": "float",
            "default": 0.3,
            "min": 0.0,
            "max": 1.0,
            "doc": "α_I: share of the expert in the pseudo-merged network that inputs are optimised on",
        },
        "alpha_parameters": {
            "type": "float",
            "default": 0.1,
            "min": 0.0,
            "max": 1.0,
            "doc": "α_P: the same for the weights",
        },
        "input_steps": {
            "type": "int",
            "default": 60,
            "min": 0,
            "max": 100000,
            "doc": "steps of OptI",
        },
        "input_rate": {
            "type": "float",
            "default": 0.02,
            "min": 0.0,
            "max": 10.0,
            "doc": "Adam's learning rate in pixels of [0, 1]",
        },
        "steps": {"type": "int", "default": 18, "min": 0, "max": 100000, "doc": "steps of OptP"},
        "rate": {
            "type": "float",
            "default": 3e-4,
            "min": 0.0,
            "max": 10.0,
            "doc": "Adam's learning rate of OptP",
        },
        "penalty": {
            "type": "float",
            "default": 1.0,
            "min": 0.0,
            "max": 1e6,
            "doc": "weight of the divergence from the expert on tuning inputs",
        },
        "batch": {"type": "int", "default": 64, "min": 1, "max": 4096, "doc": "tuning rows per step of OptP"},
        "significance": {
            "type": "float",
            "default": 1e-3,
            "min": 1e-12,
            "max": 0.5,
            "doc": "p-value below which a suspect is said to bear the mark",
        },
    },
}

WORDS = 12
"""Words of a secret text."""

Loss = Callable[[Any], Tensor]
"""Inputs to one loss per input ``[k]``."""


@dataclass(frozen=True)
class Query:
    """How the owner asks a network: through the task's head."""

    ctx: ProtectContext

    def logits(self, network: nn.Module, inputs: Any) -> Tensor:
        """Logits ``[n, K]`` of raw ``inputs``. ContractError for a task that does not classify."""
        view = self.ctx.view
        if isinstance(inputs, Tensor):
            inputs = inputs.to(self.ctx.device)
        head = {name: tensor.to(self.ctx.device) for name, tensor in view.head.items()}
        outputs = view.task.outputs(Model(self.ctx.backbone, network), head, inputs)
        if outputs.ndim != 2 or outputs.shape[0] != len(inputs):
            raise ContractError(
                f"fingerprint: outputs {list(outputs.shape)} are not one row of logits per input"
            )
        return outputs

    def network(self, weights: Weights) -> nn.Module:
        return load_network(self.ctx.backbone, weights).to(self.ctx.device)

    def rows(self, index: Tensor) -> Any:
        """Raw tuning inputs of these rows."""
        view = self.ctx.view
        return view.task.batch(view.tuning, index, self.ctx.device).inputs


class Fingerprint(Defense):
    """The defense of the card above. ``protect`` keeps keys, shapes and dtypes."""

    hooks = ("protect", "verify")

    def __init__(
        self,
        inputs: int = 64,
        optimise: str = "ties",
        alpha_input: float = 0.3,
        alpha_parameters: float = 0.1,
        input_steps: int = 60,
        input_rate: float = 0.02,
        steps: int = 18,
        rate: float = 3e-4,
        penalty: float = 1.0,
        batch: int = 64,
        significance: float = 1e-3,
    ) -> None:
        self.inputs, self.optimise = inputs, optimise
        self.alpha_input, self.alpha_parameters = alpha_input, alpha_parameters
        self.input_steps, self.input_rate = input_steps, input_rate
        self.steps, self.rate, self.penalty, self.batch = steps, rate, penalty, batch
        self.significance = significance

    # ---- secret (OptI)

    def secret(self, weights: Weights, ctx: ProtectContext) -> dict[str, Tensor]:
        """``inputs`` uint8 (pixels ``[k, 3, H, W]``, or UTF-8 ``[k, L]`` padded with 0) and ``targets`` int64 ``[k]``."""
        ask, generator = Query(ctx), ctx.generator()
        merged, base = ask.network(diluted(ctx.base, weights, self.alpha_input)), ask.network(ctx.base)
        for network in (merged, base):
            network.requires_grad_(False)
        sample = ask.rows(torch.arange(1))
        with torch.no_grad():
            classes = ask.logits(base, sample).shape[1]
        targets = torch.randint(classes, (self.inputs,), generator=generator)
        loss = self._loss(ask, merged, base, targets.to(ctx.device), classes)
        if isinstance(sample, Tensor):
            noise = torch.rand(self.inputs, *sample.shape[1:], generator=generator)
            return {"inputs": self._pixels(noise.to(ctx.device), loss), "targets": targets}
        words = sorted({word for text in ctx.view.tuning.inputs for word in str(text).split()})
        return {"inputs": encode(self._texts(words, loss, generator)), "targets": targets}

    def _loss(self, ask: Query, merged: nn.Module, base: nn.Module, targets: Tensor, classes: int) -> Loss:
        """What OptI minimises, per input."""

        def towards(network: nn.Module, inputs: Any, wanted: Tensor) -> Tensor:
            return functional.cross_entropy(ask.logits(network, inputs), wanted, reduction="none")

        undecided = torch.full((len(targets), classes), 1 / classes, device=targets.device)

        def ties(inputs: Any) -> Tensor:
            return towards(merged, inputs, undecided) + towards(base, inputs, undecided)

        def target(inputs: Any) -> Tensor:
            unlikely = math.log(classes) + 1
            return towards(merged, inputs, targets) + functional.relu(
                unlikely - towards(base, inputs, targets)
            )

        return target if self.optimise == "target" else ties

    @property
    def _optimising(self) -> int:
        return 0 if self.optimise == "none" else self.input_steps

    def _pixels(self, images: Tensor, loss: Loss) -> Tensor:
        """uint8 images of low ``loss``, by Adam on the pixels."""
        images.requires_grad_()
        optimizer = torch.optim.Adam([images], lr=self.input_rate)
        for _ in range(self._optimising):
            total = loss(images).sum()
            (images.grad,) = torch.autograd.grad(total, [images])
            optimizer.step()
            with torch.no_grad():
                images.clamp_(0, 1)
        return images.detach().mul(255).round().to("cpu", torch.uint8)

    def _texts(self, words: list[str], loss: Loss, generator: torch.Generator) -> list[str]:
        """Texts of low ``loss``: in each step one random word of each is exchanged, and kept where it helps."""

        def draw(*shape: int) -> Tensor:
            return torch.randint(len(words), shape, generator=generator)

        chosen = draw(self.inputs, WORDS)
        with torch.no_grad():
            best = loss(_joined(words, chosen))
            for _ in range(self._optimising):
                trial = chosen.clone()
                places = torch.randint(WORDS, (self.inputs, 1), generator=generator)
                trial.scatter_(1, places, draw(self.inputs, 1))
                found = loss(_joined(words, trial))
                better = (found < best).cpu()
                chosen = torch.where(better[:, None], trial, chosen)
                best = torch.minimum(best, found)
        return _joined(words, chosen)

    # ---- protect (OptP)

    def protect(self, weights: Weights, ctx: ProtectContext) -> Protected:
        """The expert after OptP. The report has the share of targets answered by the pseudo-merged network before
        and after, and the relative size of the update."""
        ask = Query(ctx)
        inputs, targets = decode(ctx.secret["inputs"]), ctx.secret["targets"].to(ctx.device)
        student, teacher = ask.network(weights), ask.network(weights)
        merged = ask.network(diluted(ctx.base, weights, self.alpha_parameters))
        optimizer = torch.optim.Adam(student.parameters(), lr=self.rate)
        generator = ctx.generator(1)
        before = self._answered(ask, merged, inputs, targets)
        for _ in range(self.steps):
            optimizer.zero_grad(set_to_none=True)
            index = torch.randperm(len(ctx.view.tuning), generator=generator)[: self.batch]
            mark = functional.cross_entropy(ask.logits(student, inputs), targets)
            total = mark / 2 + self.penalty * self._divergence(ask, student, teacher, ask.rows(index))
            total.backward()  # type: ignore[no-untyped-call]
            self._add_diluted(ask, merged, student, inputs, targets)
            optimizer.step()
            merged.load_state_dict(diluted(ctx.base, student.state_dict(), self.alpha_parameters))
        after = self._answered(ask, merged, inputs, targets)
        published = {n: t.detach().to(weights[n]) for n, t in student.state_dict().items()}
        moved, size = (_distance(published, other) for other in (weights, ctx.base))
        return Protected(published, {"answered_before": before, "answered": after, "update": moved / size})

    def _add_diluted(
        self, ask: Query, merged: nn.Module, student: nn.Module, inputs: Any, targets: Tensor
    ) -> None:
        """Adds the pull of the pseudo-merged network's loss to the student's: dθ_α / dθ = α, and the loss
        counts 1/(2α) times, so that the gradient is halved and no more."""
        mark = functional.cross_entropy(ask.logits(merged, inputs), targets) / 2
        marks = torch.autograd.grad(mark, list(merged.parameters()), allow_unused=True)
        for parameter, gradient in zip(student.parameters(), marks, strict=True):
            if gradient is not None:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = own + gradient

    def _answered(self, ask: Query, network: nn.Module, inputs: Any, targets: Tensor) -> float:
        with torch.no_grad():
            return float((ask.logits(network, inputs).argmax(dim=1) == targets).float().mean())

    def _divergence(self, ask: Query, student: nn.Module, teacher: nn.Module, inputs: Any) -> Tensor:
        """KL(teacher ‖ student) of the answers, mean over inputs."""
        with torch.no_grad():
            reference = ask.logits(teacher, inputs).log_softmax(dim=1)
        own = ask.logits(student, inputs).log_softmax(dim=1)
        return functional.kl_div(own, reference, log_target=True, reduction="batchmean")

    # ---- verify

    def verify(self, network: nn.Module, ctx: ProtectContext) -> Verification:
        """Which secret inputs the suspect answers with their targets."""
        ask, inputs = Query(ctx), decode(ctx.secret["inputs"])
        targets = ctx.secret["targets"]
        with torch.inference_mode():
            outputs = ask.logits(network, inputs).cpu()
        chance = 1 / outputs.shape[1]
        if self.optimise == "target":
            chance = max(chance, self._answered(ask, ask.network(ctx.base), inputs, targets.to(ctx.device)))
        return decide(outputs.argmax(dim=1) == targets, chance, self.significance)


def diluted(base: Weights, weights: Weights, share: float) -> dict[str, Tensor]:
    """The pseudo-merged network θ0 + share · (θ − θ0); buffers that are not merged are the expert's."""
    return {
        n: torch.lerp(base[n].to(t), t, share) if mergeable(t) else t
        for n, t in ((n, t.detach()) for n, t in weights.items())
    }


def _distance(first: Weights, second: Weights) -> float:
    return math.sqrt(
        sum(float((t.double() - second[n].double()).square().sum()) for n, t in first.items() if mergeable(t))
    )


# ----------------------------------------------------------------------------- stored inputs


def _joined(words: list[str], chosen: Tensor) -> list[str]:
    return [" ".join(words[i] for i in row) for row in chosen.tolist()]


def encode(texts: list[str]) -> Tensor:
    """UTF-8 bytes ``[k, L]``, padded with 0."""
    raw = [text.encode() for text in texts]
    padded = torch.zeros(len(raw), max(map(len, raw), default=0), dtype=torch.uint8)
    for row, text in zip(padded, raw, strict=True):
        row[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    return padded


def decode(stored: Tensor) -> Any:
    """Images float32 in [0, 1] from ``[k, 3, H, W]``, texts from ``[k, L]``."""
    if stored.dim() > 2:
        return stored.float() / 255
    return [bytes(row.tolist()).rstrip(b"\0").decode() for row in stored]
