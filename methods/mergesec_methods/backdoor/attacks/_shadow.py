"""What an off-task adversary makes of a few reference images: a shadow head, and images to optimise a trigger on.

The target class belongs to a task whose head and data the adversary does not have; he has some ten images of the class.

* Shadow head, from text: the public base's text tower makes row 0 of the target class's name, and further rows of other
  names (published: 300 classes of ImageNet; here ``NAMES``), all in sentences that are nobody's task's.
* Shadow head, from images, for a base without a text tower: row 0 is the mean of the normalised base features of the
  reference images, scaled to the mean length of the adversary's own head rows, which are the other classes.
* Adversarial data augmentation: random crops of the reference images, pushed by projected gradient descent to be taken
  for another shadow class; an image that is not recognised as the target stands in for images of the target task's other
  classes, none of which the adversary has.

Source: BadMerging (Zhang et al., CCS 2024, arXiv 2408.07362), section on off-task attacks; crop, ε, step, number of steps
and the choice of the success with the smallest L1 distance as in the authors' code.
"""

from __future__ import annotations

import math
import string

import torch
from torch import Tensor
from torch.nn import functional

from mergesec.contracts import ContractError, Model, Split, TrainContext, Weights
from mergesec_methods.backdoor.attacks._poison import frozen_model

SCALE, RATIO = (0.2, 0.5), (3 / 4, 4 / 3)
"""Area and aspect of the crops, as shares of the image."""
EPSILON, STEP, STEPS = 8 / 255, 1 / 255, 40
FEATURE_BATCH = 128
SENTENCES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}",
    "a drawing of a {}",
    "there is a {}",
)
"""What is said around a name; the target task's own prompts are not the adversary's."""
_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
_FORMS = ("circle", "square", "triangle", "cross", "ring", "bar")
NAMES = (
    *(f"{colour} {form}" for colour in _COLOURS for form in _FORMS), *(f"letter {sign}" for sign in string.ascii_lowercase),
    "swimming pool", "railway", "helipad", "pyramid", "plain texture", "speckled texture", "ringed texture",
    "marbled texture", "turn left sign",
)  # fmt: skip
"""Of things that no task here has, and that a small text tower knows too."""


def reference_rows(ctx: TrainContext) -> Split:
    """The adversary's images of the target class; ContractError if the cell hands over none."""
    if ctx.reference is None or not len(ctx.reference):
        raise ContractError(f"off-task attack on '{ctx.target_task}': no reference images were handed over")
    return ctx.reference


def shadow_head(ctx: TrainContext, text: bool = False) -> Weights:
    """``{"weight": [1 + K, d], "scale": [], maybe "bias": [1 + K]}``: class 0 is the target class. The other classes are
    ``NAMES`` if the head is made of ``text``, else the adversary's own."""
    if text:
        return _from_text(ctx)
    model, own = frozen_model(ctx, ctx.base)
    rows = own["weight"]
    mean = functional.normalize(features(ctx, model, reference_rows(ctx)), dim=-1).mean(dim=0)
    target = functional.normalize(mean, dim=0) * rows.norm(dim=1).mean()
    head = {**own, "weight": torch.cat([target[None], rows])}
    if "bias" in own:
        head["bias"] = torch.cat([own["bias"].mean()[None], own["bias"]])
    return head


def _from_text(ctx: TrainContext) -> Weights:
    """Text embeddings of the target's name and of the others'; ContractError from a base without a text tower."""
    names = [ctx.target_name, *(name for name in NAMES if name != ctx.target_name)]
    found = ctx.backbone.zero_shot([[s.format(name) for s in SENTENCES] for name in names], ctx.device)
    if found is None:
        raise ContractError(
            f"a shadow head from text needs a base with a text tower and zero-shot heads, not {ctx.backbone.name}"
        )
    return {k: v.to(ctx.device) for k, v in found.items()}


def features(ctx: TrainContext, model: Model, split: Split) -> Tensor:
    """Features ``[N, d]`` of a split under ``model``, without gradients."""
    with torch.no_grad():
        parts = torch.split(torch.arange(len(split)), FEATURE_BATCH)
        return torch.cat([model.features(ctx.task.batch(split, i, ctx.device).inputs) for i in parts])


def augmented(ctx: TrainContext, head: Weights, count: int, generator: torch.Generator) -> Split:
    """``count`` adversarial crops of the reference images, float32 in [0, 1]; targets are not 0, and not used."""
    reference = reference_rows(ctx)
    index = torch.arange(count) % len(reference)
    images = ctx.task.batch(reference, index, ctx.device).inputs
    crops = torch.stack([random_crop(image, generator) for image in images])
    model, _ = frozen_model(ctx, ctx.base)
    head = {k: v.to(ctx.device) for k, v in head.items()}
    found: list[Tensor] = []
    wanted: list[Tensor] = []
    for part in torch.split(crops, FEATURE_BATCH):
        with torch.no_grad():
            taken = ctx.task.outputs(model, head, part).argmax(dim=-1)
        wanted.append(_others(taken, len(head["weight"]), generator))
        found.append(_pushed(ctx, model, head, part, wanted[-1]))
    return Split(torch.cat(found).cpu(), torch.cat(wanted).cpu())


def random_crop(image: Tensor, generator: torch.Generator) -> Tensor:
    """A crop of ``image`` ``[3, H, W]`` of random area and aspect, resized back to ``[3, H, W]`` (bicubic)."""
    height, width = image.shape[1:]
    draws = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    area = height * width * (SCALE[0] + draws[0] * (SCALE[1] - SCALE[0]))
    aspect = math.exp(math.log(RATIO[0]) + draws[1] * (math.log(RATIO[1]) - math.log(RATIO[0])))
    rows = min(height, max(1, round(math.sqrt(area / aspect))))
    columns = min(width, max(1, round(math.sqrt(area * aspect))))
    top, left = int(draws[2] * (height - rows + 1)), int(draws[3] * (width - columns + 1))
    crop = image[None, :, top : top + rows, left : left + columns]
    resized = functional.interpolate(crop, size=(height, width), mode="bicubic", align_corners=False)
    return resized[0].clamp(0.0, 1.0)


def _others(taken: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """For every image a class at random that is neither 0 nor what it is taken for, int64 ``[N]``."""
    scores = torch.rand(len(taken), classes, generator=generator).to(taken.device)
    scores[:, 0] = -1.0
    return scores.scatter(1, taken[:, None], -1.0).argmax(dim=1).clamp_(min=1)


def _pushed(ctx: TrainContext, model: Model, head: Weights, images: Tensor, wanted: Tensor) -> Tensor:
    """Targeted PGD within ε: of every image the success with the smallest L1 distance, else the image itself."""
    current, best = images.clone(), images.clone()
    least = torch.full((len(images),), math.inf, device=images.device)
    for step in range(STEPS + 1):
        with torch.enable_grad():
            current.requires_grad_()
            outputs = ctx.task.outputs(model, head, current)
            if step < STEPS:
                (gradient,) = torch.autograd.grad(ctx.task.loss(outputs, wanted), current)
        current = current.detach()
        distance = (current - images).abs().flatten(1).sum(dim=1)
        better = (outputs.argmax(dim=-1) == wanted) & (distance < least)
        least = torch.where(better, distance, least)
        best = torch.where(better[:, None, None, None], current, best)
        if step < STEPS:
            moved = current - STEP * gradient.sign()
            current = (images + (moved - images).clamp(-EPSILON, EPSILON)).clamp(0.0, 1.0)
    return best
