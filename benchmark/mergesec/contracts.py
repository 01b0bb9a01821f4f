"""What a Task, Backbone, MergeMethod, Attack and Defense is, and what each is handed.

This is the whole surface a catalogue or a plugin programs against. Every hook is a pure function
of what its context hands over: it returns new tensors and leaves the ones it was given alone
(the runner checks), takes its randomness from the context, and never sees test data.

Tensors in a ``Weights`` mapping are read-only by contract. Shapes are written ``[N, C, H, W]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mergesec.anatomy import Anatomy
from mergesec.recipes import Recipe as Recipe

Weights = Mapping[str, Tensor]
"""Named tensors of one network; read-only."""

LossFn = Callable[["Model", "Split"], Tensor]
"""(model in training mode, batch) -> scalar loss."""


class ContractError(ValueError):
    """A component returned something its contract does not allow (the message names what)."""


@runtime_checkable
class Takes(Protocol):
    """Raw inputs of several tensors a row, which pick their own rows."""

    def take(self, index: Tensor) -> Any:
        """The rows named by ``index``, in that order."""


@dataclass(frozen=True)
class Split:
    """Inputs and targets of one split or batch.

    ``inputs`` is whatever the task's modality stores raw: images are uint8 ``[N, 3, H, W]`` on
    disk and float32 in [0, 1] once batched; text is a list of strings. ``targets`` int64 ``[N]``.
    """

    inputs: Any
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: Tensor) -> Split:
        """The rows named by ``index`` (int64 ``[M]``), in that order."""
        if isinstance(self.inputs, Tensor):
            # index_select copies whole rows: ten times faster than indexing on bytes
            place = index.to(self.inputs.device)
            return Split(self.inputs.index_select(0, place), self.targets[index])
        if isinstance(self.inputs, Takes):
            return Split(self.inputs.take(index), self.targets[index])
        return Split([self.inputs[i] for i in index.tolist()], self.targets[index])

    def with_inputs(self, inputs: Any) -> Split:
        return replace(self, inputs=inputs)


@dataclass(frozen=True)
class Context:
    """What every hook gets: where it runs and the randomness the runner drew for it."""

    device: torch.device
    seed: int

    def generator(self, stream: int = 0) -> torch.Generator:
        """A fresh CPU generator; the same call gives the same numbers."""
        generator = torch.Generator(device="cpu")
        generator.manual_seed((self.seed + 0x9E3779B97F4A7C15 * stream) % (2**63))
        return generator


class Component:
    """Base of everything registered. Parameters arrive as validated keyword arguments."""

    name: str = ""
    """Registered name; set by the catalogue."""


# --------------------------------------------------------------------------- tasks, backbones


@dataclass(frozen=True)
class DataContext(Context):
    """What a task may look at to load its data. ``folder`` is its local folder, if it has one."""

    folder: str | None = None


class Backbone(Component, ABC):
    """Builds an empty network, loads base weights, tells the anatomy, and encodes raw inputs."""

    @abstractmethod
    def build(self) -> nn.Module:
        """A network whose ``state_dict`` has the names and shapes of ``base_weights``."""

    @abstractmethod
    def base_weights(self) -> Weights:
        """The shared pretrained weights, float32."""

    @abstractmethod
    def anatomy(self) -> Anatomy:
        """Which tensors are a block's query, key, value, output, up, gate and down."""

    @abstractmethod
    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        """Raw inputs to features ``[N, d]``: resizing, normalising or tokenising happens here.

        Differentiable in float image inputs, so that triggers can be optimised in pixel space.
        """

    def head(self, task: str) -> Weights | None:
        """The frozen head that ships with the base for ``task``; None if it has to be fitted."""
        return None

    def published(self, source: str) -> Weights:
        """The weights of an expert that somebody published for this base, under the base's names.

        ``source``: a folder or safetensors file, or ``owner/name@commit`` of the hub. Nothing is unpickled.
        """
        raise ContractError(f"{self.name}: reads no published experts")

    def zero_shot(self, prompts: Sequence[Sequence[str]], device: torch.device) -> Weights | None:
        """A head from sentences, one list per class, by the base's text tower; None if it has none."""
        return None


class Adapted(nn.Module):
    """A network and a map on its features: what a merge's ``network`` returns for a task with an adapter.

    ``adapter`` takes and gives features ``[N, d]``; ``Model.features`` applies it, whatever the backbone.
    """

    def __init__(self, network: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.network, self.adapter = network, adapter


@dataclass
class Model:
    """A backbone with some weights loaded, on a device."""

    backbone: Backbone
    network: nn.Module

    def features(self, inputs: Any) -> Tensor:
        """Features ``[N, d]`` of raw ``inputs``."""
        if isinstance(self.network, Adapted):
            adapted: Tensor = self.network.adapter(self.backbone.features(self.network.network, inputs))
            return adapted
        return self.backbone.features(self.network, inputs)


class Measured(NamedTuple):
    """What a task that measures for itself found on its test split."""

    predictions: Tensor
    """One integer per test row, as ``Task.predictions`` gives them."""
    values: Mapping[str, tuple[float, float, float]]
    """Further measures: the value and the ends of its 95 % interval."""
    kept: Mapping[str, Tensor]
    """Tensors worth storing, e.g. generated images of some rows."""
    copies: Tensor | None = None
    """Per row, where an attack aims at one output: whether the row came out as that."""


class Task(Component, ABC):
    """Owns its modality: data, splits, frozen head, loss, outcome of a sample."""

    classes: Sequence[str]

    @abstractmethod
    def load(self, ctx: DataContext) -> dict[str, Split]:
        """Splits ``train``, ``tuning`` and ``test``; tuning is never cut from test."""

    @abstractmethod
    def fit_head(self, model: Model, split: Split, ctx: Context) -> Weights:
        """The frozen head for a base that ships none, fitted on training rows only."""

    @abstractmethod
    def outputs(self, model: Model, head: Weights, inputs: Any) -> Tensor:
        """What the task's loss and outcome are computed from (classification: logits ``[N, K]``)."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Scalar training loss."""

    @abstractmethod
    def predictions(self, outputs: Tensor) -> Tensor:
        """One integer per sample ``[N]``; correct where it equals the target."""

    def noised(self, batch: Split, generator: torch.Generator) -> Split:
        """A training batch with the chance that the task's loss needs (times and noise of a diffusion); by
        default none. The runner calls it before every training step."""
        return batch

    def fixed(self, batch: Split) -> Split:
        """A batch as ``noised`` makes it, but with chance that belongs to each row and never changes: what
        statistics of data are computed on, so that they depend on nothing but the rows."""
        return batch

    def served(self, model: Model, head: Weights, inputs: Any) -> Tensor:
        """What a user of the model gets, a row per input; two networks are the same function if it is equal."""
        return self.outputs(model, head, inputs)

    def measure(
        self,
        model: Model,
        head: Weights,
        splits: Mapping[str, Split],
        device: torch.device,
        change: Callable[[Any], Any] | None = None,
        aim: Tensor | None = None,
    ) -> Measured | None:
        """Measures the test split by the task's own rules; None if predictions of its rows are all there is.

        ``change`` puts a trigger on a batch of raw inputs; ``aim`` is the output that the attack wants, if its
        trigger names one (``target``).
        """
        return None

    def prompts(self, templates: Sequence[str]) -> list[list[str]]:
        """Sentences per class for a zero-shot head: each template with the class's name in its ``{}``."""
        return [[template.format(name) for template in templates] for name in self.classes]

    def pack(self, splits: Mapping[str, Split]) -> dict[str, Tensor]:
        """Splits as named tensors, to be stored. Text tasks override this pair."""
        packed: dict[str, Tensor] = {}
        for name, split in splits.items():
            packed[f"{name}/inputs"], packed[f"{name}/targets"] = split.inputs, split.targets
        return packed

    def unpack(self, tensors: Weights) -> dict[str, Split]:
        names = sorted({key.split("/")[0] for key in tensors})
        return {n: Split(tensors[f"{n}/inputs"], tensors[f"{n}/targets"]) for n in names}

    def batch(self, split: Split, index: Tensor, device: torch.device) -> Split:
        """Rows ``index`` as a batch in raw input space, tensors on ``device``."""
        rows = split.take(index)
        inputs = rows.inputs.to(device) if isinstance(rows.inputs, Tensor) else rows.inputs
        return Split(inputs, rows.targets.to(device))

    def views(self, inputs: Any, kind: str, generator: torch.Generator) -> Any:
        """Random views of a batch of raw inputs, as ``recipe.augment`` asks for; ContractError if there are none."""
        raise ContractError(f"augment: {kind!r} is not for the inputs of {self.name}")

    def check_triggered(self, triggered: Any, inputs: Any, who: str) -> Any:
        """``triggered``, if it is what ``inputs`` are: raw inputs, as many. ContractError if it is not."""
        found = len(triggered) if isinstance(triggered, Sized) else type(triggered).__name__
        if found != len(inputs):
            raise ContractError(f"{who}.apply returned {found} inputs for {len(inputs)}")
        return triggered

    def visibility(self, inputs: Any, triggered: Any) -> dict[str, float]:
        """Measures of how much a trigger changes raw inputs, by name; empty if the modality has none."""
        return {}


# --------------------------------------------------------------------------- merging


@dataclass(frozen=True)
class Expert:
    """A published expert: the task it was fine-tuned for and its weights."""

    task: str
    weights: Weights
    findings: Weights = field(default_factory=dict)
    """What a screen's ``examine`` found in it; empty for everybody else."""


@dataclass(frozen=True)
class Merged:
    """What a merge gives: shared weights, and what differs per task (masks, adapters), if anything.

    ``per_task[t]`` overrides or extends ``shared`` for task t; ``extra`` holds routers and the
    like that only the method's own ``network`` understands.
    """

    shared: Weights
    per_task: Mapping[str, Weights] = field(default_factory=dict)
    extra: Weights = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    """Small JSON facts worth keeping, e.g. the tuned scaling coefficient."""


@dataclass(frozen=True)
class TaskView:
    """What a defense, merge or attack may know of a task: its tuning rows and head. No test data."""

    task: Task
    head: Weights
    tuning: Split
    unlabelled: Any = None
    """Inputs to adapt on without labels: tuning inputs, or test inputs under ``protocol: transductive``."""


@dataclass(frozen=True)
class MergeContext(Context):
    """For merges and repairs. ``score`` is the mean tuning accuracy of a merged model, in [0, 1]."""

    backbone: Backbone
    views: Mapping[str, TaskView]
    score: Callable[[Merged], float]
    siblings: Mapping[str, Sequence[Expert]] = field(default_factory=dict)
    """Further independent experts per task, as many as the defense's card asks for."""
    inner: MergeMethod | None = None
    """The merge method that this one wraps, if its card says so (``wraps``)."""
    networks: Callable[[Merged, str], nn.Module] | None = None
    """The network that serves a task by the merge method's own rules, a fresh one on ``device`` in evaluation
    mode: what a repair of a merge that keeps weights per task looks at. Set in every step."""
    references: Mapping[str, Sequence[Expert]] = field(default_factory=dict)
    """Malicious experts per task that the defense made itself (``Defense.reference``), as many as its card asks for."""


class MergeMethod(Component, ABC):
    """Maps (base, experts, context) to a merged model."""

    @classmethod
    def unfit_inner(cls, inner: type[MergeMethod]) -> str | None:
        """Why this method cannot wrap ``inner``, or None if it can; asked when a grid is read. Only of
        methods whose card ``wraps``; that ``inner`` makes one set of weights and wraps nothing is known."""
        return None

    @abstractmethod
    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        """The merged model. Integer tensors and tensors equal in all inputs keep the base's value."""

    def network(self, backbone: Backbone, merged: Merged, task: str) -> nn.Module:
        """The network that serves ``task``. Methods with routers or adapters override this."""
        return load_network(backbone, {**merged.shared, **merged.per_task.get(task, {})})


def load_network(backbone: Backbone, weights: Weights) -> nn.Module:
    """``backbone.build()`` with ``weights`` loaded strictly, where they lie, in evaluation mode."""
    place = next((tensor.device for tensor in weights.values()), torch.device("cpu"))
    network = backbone.build()
    if place.type != "cpu":  # else the weights would come back, and go there again with the network
        network = network.to(place)
    network.load_state_dict(dict(weights), strict=True)
    return network.eval()


# --------------------------------------------------------------------------- attacks


class Fit(Protocol):
    """Fine-tunes an expert by the cell's recipe."""

    def __call__(self, split: Split | None = None, loss: LossFn | None = None) -> Weights:
        """The trained weights; with another training split and/or another loss than the task's.

        ContractError if the loss stops being finite.
        """


@dataclass(frozen=True)
class TrainContext(Context):
    """For hooks at training time. ``fit`` runs the recipe and returns the trained weights.

    ``target_class``, ``trigger`` and what follows them are set for backdoors only.
    """

    task: Task
    backbone: Backbone
    base: Weights
    head: Weights
    train: Split
    recipe: Recipe
    fit: Fit
    target_class: int = 0
    trigger: Weights = field(default_factory=dict)
    benign: Weights | None = None
    """The clean expert of the same coordinates; set in ``forge``."""
    target_task: str = ""
    """Off-task: the task that ``target_class`` belongs to. Empty: the adversary's own."""
    target_name: str = ""
    """Off-task: what ``target_class`` is called."""
    reference: Split | None = None
    """Off-task: ten training rows of the target class (fewer if there are fewer), all that the adversary has
    of ``target_task``; the same rows in every hook of a cell."""
    defense: Defense | None = None
    """The cell's defense, a public algorithm; set in ``poison`` and ``forge`` for attacks whose card says
    ``adapts``. None where the cell has no defense."""


@dataclass(frozen=True)
class RecoverContext(Context):
    """The free-rider's view: public base, the published model's task, his own experts, his data."""

    backbone: Backbone
    base: Weights
    victim: str
    own: Sequence[Expert]
    views: Mapping[str, TaskView]
    """Views of the free-rider's own tasks; of the victim's too for an attack that tries merges."""
    score: Callable[[Weights], float] | None = None
    """Mean tuning accuracy, in [0, 1], of the cell's merge with these weights in the victim's place;
    set for attacks whose card says ``tries``."""
    inner: Sequence[Attack] = ()
    """The attacks that this one tries, if its card says so (``wraps``)."""
    answers: Callable[[], nn.Module] | None = None
    """The published expert as a network to call, a fresh one on ``device`` in evaluation mode, in the topology that its
    owner serves; set for attacks whose card says ``queries``, where the defense is no plugin."""


class Attack(Component):
    """One or more hooks; the card lists which. T1: trigger (with apply), poison, forge. T2: recover."""

    def trigger(self, ctx: TrainContext) -> Weights:
        """The trigger's arrays, in raw input space. Stored and reused between cells."""
        raise ContractError(f"{self.name}: the card lists a hook that needs trigger()")

    def apply(self, trigger: Weights, inputs: Any) -> Any:
        """Raw inputs (images float32 in [0, 1] ``[N, 3, H, W]``) with the trigger on them."""
        raise ContractError(f"{self.name}: the card lists a hook that needs apply()")

    def poison(self, ctx: TrainContext) -> Weights:
        """The malicious expert's weights."""
        raise ContractError(f"{self.name}: the card lists poison but the class has none")

    def forge(self, weights: Weights, ctx: TrainContext) -> Weights:
        """The malicious expert after an edit of its weights."""
        raise ContractError(f"{self.name}: the card lists forge but the class has none")

    def recover(self, published: Weights, ctx: RecoverContext) -> Weights:
        """The published weights with the protection undone as well as can be."""
        raise ContractError(f"{self.name}: the card lists recover but the class has none")


# --------------------------------------------------------------------------- defenses


@dataclass(frozen=True)
class ProtectContext(Context):
    """The owner's view when protecting a finished expert."""

    backbone: Backbone
    base: Weights
    view: TaskView
    secret: Weights = field(default_factory=dict)
    """What ``Defense.secret`` made: the owner's alone, stored apart from what is published."""


@dataclass(frozen=True)
class Verification:
    """The owner's test of a suspect network: the outcome of each query or bit, bool ``[n]``."""

    hits: Tensor
    detected: bool
    statistic: float = 0.0
    """What the decision rests on, e.g. a p-value."""


@dataclass(frozen=True)
class Protected:
    """A protected expert. ``report`` holds JSON facts such as condition numbers."""

    weights: Weights
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Screened:
    """What a screen lets in, and why. ``report`` holds small JSON facts, such as every expert's score; numbers
    in it are finite."""

    experts: Sequence[Expert]
    report: Mapping[str, Any] = field(default_factory=dict)


class Defense(Component):
    """One or more hooks; the card lists which. T1: examine, screen, merge, repair. T2: train, protect, verify."""

    def train(self, ctx: TrainContext) -> Weights:
        """An expert trained so that it resists merging."""
        raise ContractError(f"{self.name}: the card lists train but the class has none")

    def protect(self, weights: Weights, ctx: ProtectContext) -> Protected:
        """The expert as it is published."""
        raise ContractError(f"{self.name}: the card lists protect but the class has none")

    def secret(self, weights: Weights, ctx: ProtectContext) -> Weights:
        """What the owner keeps to prove ownership later (marks that ``verify`` looks for)."""
        raise ContractError(f"{self.name}: the card lists verify but the class has no secret")

    def verify(self, network: nn.Module, ctx: ProtectContext) -> Verification:
        """Whether ``network`` (a merge, or a stand-alone expert) bears the owner's mark."""
        raise ContractError(f"{self.name}: the card lists verify but the class has none")

    def network(self, backbone: Backbone, weights: Weights) -> nn.Module:
        """The network of a protected expert; overridden where protection changes the topology."""
        return load_network(backbone, weights)

    def reference(self, ctx: TrainContext) -> Weights:
        """A malicious expert of the merger's own making; ``ctx`` knows no cell's trigger and no target class."""
        raise ContractError(f"{self.name}: the card asks for references but the class makes none")

    def examine(self, base: Weights, expert: Expert, ctx: MergeContext) -> Weights:
        """What a screen finds in one contributed expert by itself, as named tensors (at least one), finite.

        ``ctx`` has the view of the expert's own task only. The runner asks once per expert and hands the answer to
        ``screen`` as ``expert.findings``, in every cell that this expert is part of.
        """
        raise ContractError(f"{self.name}: the card lists examine but the class has none")

    def examined(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> list[Expert]:
        """The experts with their findings, ``examine`` asked about those that have none yet."""
        return [e if e.findings else replace(e, findings=self.examine(base, e, ctx)) for e in experts]

    def screen(
        self, base: Weights, experts: Sequence[Expert], ctx: MergeContext
    ) -> Sequence[Expert] | Screened:
        """The experts that may enter the merge (a subset, or edited copies), with a report if there is one."""
        raise ContractError(f"{self.name}: the card lists screen but the class has none")

    def merge(
        self, base: Weights, experts: Sequence[Expert], method: MergeMethod, ctx: MergeContext
    ) -> Merged:
        """The merge, done instead of (usually around) ``method``."""
        raise ContractError(f"{self.name}: the card lists merge but the class has none")

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """The merged model after sanitising."""
        raise ContractError(f"{self.name}: the card lists repair but the class has none")
