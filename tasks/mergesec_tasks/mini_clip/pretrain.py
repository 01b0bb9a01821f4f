"""How the small CLIP was made: images against sentences, both towers from nothing.

It sees the classes of the eight tasks only in grey, often inverted, flat and noisy photographs, with printed digits instead
of handwritten ones, and none of the tasks' own images; beside them letters, coloured shapes, and signs, textures and
objects that no task has. Every image of a step is told apart from one fresh sentence about each class, and every sentence
from all images of the step (Radford et al., 2021, with more than one match where several images fit a sentence).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesec.compat import ensure_torchvision
from mergesec_tasks.mini._base import Pace
from mergesec_tasks.mini._canvas import SHIFTED, Style
from mergesec_tasks.mini._rendered import RenderedTask
from mergesec_tasks.mini.cars import Cars
from mergesec_tasks.mini.dtd import Textures
from mergesec_tasks.mini.eurosat import LandUse
from mergesec_tasks.mini.gtsrb import Signs
from mergesec_tasks.mini.mnist import Digits
from mergesec_tasks.mini.resisc45 import Aerial
from mergesec_tasks.mini.sun397 import Scenes
from mergesec_tasks.mini.svhn import HouseNumbers
from mergesec_tasks.mini_clip._captions import caption, every_sentence
from mergesec_tasks.mini_clip._drawn import (
    COLOURS,
    FORMS,
    Letters,
    MoreAerial,
    MoreSigns,
    MoreTextures,
    Shapes,
)
from mergesec_tasks.mini_clip._layouts import DEVIATION, MEAN, save
from mergesec_tasks.mini_clip._words import Words, tokenizer, vocabulary, words_of

TASKS: tuple[type[RenderedTask], ...] = (Scenes, Cars, Aerial, LandUse, HouseNumbers, Signs, Digits, Textures)
OTHERS: tuple[type[RenderedTask], ...] = (Letters, MoreSigns, MoreTextures, MoreAerial)
COLOURED = Shapes
"""In colour: the only images that the words for colours are about."""
ALL: tuple[type[RenderedTask], ...] = (*TASKS, *OTHERS, COLOURED)
IMAGE, PATCH, CONTEXT, EMBEDDING = 32, 8, 32, 64
VISION = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 288}
TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192}
COMMON = {"hidden_act": "gelu", "attention_dropout": 0.0}
WARMEST = 30.0
"""The logit scale's upper end; it starts at half of that."""


class Phase(NamedTuple):
    """One stretch of training. ``shares``: images in a step of each of ``ALL``, in its order."""

    style: Style
    steps: int
    learning_rate: float
    shares: tuple[int, ...]


PHASES = (Phase(SHIFTED, 1800, 1.5e-3, (12,) * 8 + (8, 4, 4, 4, 12)),)


class Rows(NamedTuple):
    """Images uint8 ``[N, 3, 32, 32]`` of one kind and their classes ``[N]``."""

    slug: str
    classes: Sequence[str]
    images: Tensor
    labels: Tensor


def _data(count: int, style: Style, seed: int) -> list[Rows]:
    found = []
    for task in ALL:
        own = task().render(count, "pretrain", None if task is COLOURED else style, seed)
        found.append(Rows(task.slug, task.classes, own.inputs, own.targets))
    return found


def vocabulary_of_captions() -> Words:
    """A token for every word that is ever said."""
    return vocabulary(words_of(every_sentence({task.slug: task.classes for task in ALL})))


# --------------------------------------------------------------------------- network


def build(words: Words, seed: int) -> Any:
    """Both towers, untrained, as transformers' CLIPModel."""
    ensure_torchvision()
    import transformers

    last = len(words.vocabulary) - 1
    text = {
        **TEXT, **COMMON, "vocab_size": last + 1, "max_position_embeddings": CONTEXT, "bos_token_id": last - 1,
        "eos_token_id": last, "pad_token_id": last,
    }  # fmt: skip
    vision = {**VISION, **COMMON, "image_size": IMAGE, "patch_size": PATCH}
    config: Any = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=EMBEDDING,
        logit_scale_init_value=float(np.log(WARMEST / 2)),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: Any = transformers.CLIPModel(config)
        _initialise(network)
    return network


def _initialise(network: nn.Module) -> None:
    """As in the paper's code, but for places and words, which are large enough to be told apart from the start."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            inner = 0.4 if name.endswith(("out_proj", "fc2")) else 1.0
            nn.init.normal_(module.weight, std=inner * module.weight.shape[1] ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.08)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3 if "vision" in name or "token" in name else 0.03)


def _centre(network: Any, images: Tensor, tokens: Tensor) -> None:
    """Moves both towers' features so that their mean is 0: else all point one way and the loss rests at chance."""
    with torch.no_grad():
        seen = network.vision_model(pixel_values=_pixels(images)).pooler_output
        said = network.text_model(input_ids=tokens).pooler_output
        network.vision_model.post_layernorm.bias.sub_(seen.mean(0))
        network.text_model.final_layer_norm.bias.sub_(said.mean(0))


def _pixels(images: Tensor) -> Tensor:
    return (images.float() / 255.0 - MEAN[0]) / DEVIATION[0]


def _embeddings(network: Any, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings ``[N, d]`` of images uint8 and ``[M, d]`` of tokens."""
    seen = network.visual_projection(network.vision_model(pixel_values=_pixels(images)).pooler_output)
    said = network.text_projection(network.text_model(input_ids=tokens).pooler_output)
    return seen, said


# --------------------------------------------------------------------------- sentences


class Speaker:
    """Sentences for a step, as tokens, and which images each of them fits."""

    def __init__(self, words: Words, seed: int) -> None:
        self.tokenizer = tokenizer(words)
        self.rng = np.random.default_rng(seed)
        self._known: dict[str, list[int]] = {}

    def tokens(self, sentences: Sequence[str]) -> Tensor:
        """``[N, longest]``, filled up with the end token."""
        rows = []
        for text in sentences:
            if text not in self._known:
                self._known[text] = self.tokenizer(text)["input_ids"]
            rows.append(self._known[text])
        longest = max(map(len, rows))
        return torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows])

    def about(self, data: Sequence[Rows], labels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens ``[M, T]`` of one sentence per class, and one per coloured image, and what fits ``[N, M]``."""
        sentences, blocks = [], []
        for rows, own in zip(data, labels, strict=True):
            if rows.slug == COLOURED.slug:
                said, fits = self._coloured(rows, own)
            else:
                said = [caption(rows.slug, name, self.rng) for name in rows.classes]
                fits = functional.one_hot(own, len(said)).bool()
            sentences += said
            blocks.append(fits)
        return self.tokens(sentences), _diagonal(blocks)

    def _coloured(self, rows: Rows, own: Tensor) -> tuple[list[str], Tensor]:
        """A sentence per image, half of them without its place."""
        placed = torch.from_numpy(self.rng.random(len(own)) < 0.5)
        said = []
        for label, full in zip(own.tolist(), placed.tolist(), strict=True):
            words = rows.classes[label].split(" ")
            said.append(caption(rows.slug, " ".join(words if full else words[:2]), self.rng))
        alike = own[:, None] == own[None, :]
        kind = own % (len(COLOURS) * len(FORMS))
        return said, torch.where(placed[None, :], alike, kind[:, None] == kind[None, :])


def _diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks of true and false along the diagonal, false elsewhere."""
    whole = torch.zeros(*(sum(block.shape[side] for block in blocks) for side in (0, 1)), dtype=torch.bool)
    row = column = 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


def contrast(scores: Tensor, fits: Tensor) -> Tensor:
    """Cross-entropy of images over sentences and of sentences over images, matches alike; sentences that fit none
    only count against images."""
    forth = -(scores.log_softmax(1) * fits).sum(1) / fits.sum(1)
    some = fits.any(0)
    back = -(scores[:, some].log_softmax(0) * fits[:, some]).sum(0) / fits[:, some].sum(0)
    return (forth.mean() + back.mean()) / 2


# --------------------------------------------------------------------------- training


def _train(
    network: Any, data: list[Rows], speaker: Speaker, phase: Phase, seed: int, report: Callable[[str], None]
) -> None:
    parameters = list(network.parameters())
    pace = Pace(parameters, phase.learning_rate, phase.steps)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    start = time.perf_counter()
    for step in range(phase.steps):
        index = [
            torch.randint(len(rows.labels), (share,), generator=generator)
            for share, rows in zip(phase.shares, data, strict=True)
        ]
        images = torch.cat([rows.images[i] for i, rows in zip(index, data, strict=True)])
        tokens, fits = speaker.about(data, [rows.labels[i] for i, rows in zip(index, data, strict=True)])
        seen, said = _embeddings(network, images, tokens)
        cosine = functional.normalize(seen, dim=-1) @ functional.normalize(said, dim=-1).T
        loss = contrast(network.logit_scale.exp() * cosine, fits)
        pace.step(loss)
        with torch.no_grad():
            network.logit_scale.clamp_(max=float(np.log(WARMEST)))
        if step % 50 == 0 or step == phase.steps - 1:
            spent = time.perf_counter() - start
            report(f"pretrain step {step + 1}/{phase.steps} loss {loss.item():.3f} ({spent:.0f} s)")


def _round(network: nn.Module) -> None:
    """Rounds to float16, as on disk, so that a phase may also start from shipped files."""
    with torch.no_grad():
        for value in network.parameters():
            value.copy_(value.half())


def pretrain(
    out: Path,
    seed: int = 0,
    *,
    phases: tuple[Phase, ...] = PHASES,
    images: int = 6000,
    card: Path | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains both towers and writes them to ``out`` in two layouts; returns the facts.

    ``images`` counts per kind and phase. ``card``: where to write the model card, if anywhere. Deterministic for a seed, a
    thread count and a processor.
    """
    start = time.perf_counter()
    words = vocabulary_of_captions()
    network = build(words, seed)
    for number, phase in enumerate(phases):
        data, speaker = _data(images, phase.style, seed + number), Speaker(words, seed + number)
        if number == 0:
            first = [rows.labels[:16] for rows in data]
            _centre(network, torch.cat([rows.images[:16] for rows in data]), speaker.about(data, first)[0])
        _train(network, data, speaker, phase, seed + number, report)
        _round(network)
    save(out, network, words)
    facts: dict[str, Any] = {
        "seed": seed,
        "phases": [(phase.steps, sum(phase.shares), phase.learning_rate) for phase in phases],
        "images": images * len(ALL) * len(phases),
        "classes": sum(len(task.classes) for task in (*TASKS, *OTHERS)) + len(COLOURS) * len(FORMS),
        "parameters": sum(value.numel() for value in network.parameters()),
        "words": len(words.vocabulary),
        "scale": float(network.logit_scale.detach().exp()),
        "seconds": time.perf_counter() - start,
    }
    if card is not None:
        card.write_text(_card(facts), encoding="utf-8")
    return facts


def _card(facts: dict[str, Any]) -> str:
    """The model card, as Markdown."""
    phases = "; then ".join(f"{n:,} steps of {b} images at {lr:g}" for n, b, lr in facts["phases"])
    return f"""# mini-clip

| | |
|---|---|
| architecture | CLIP: ViT of 6 blocks of width 96, 4 heads, MLP 288, patches of 8×8 of 32×32 pixels; text transformer of 2 blocks of width 64 on at most 32 tokens; embeddings of width 64 |
| tokens | CLIP's byte pairs over the captions' words: {facts["words"]:,} |
| parameters | {facts["parameters"]:,} |
| data | {facts["images"]:,} renderings of {facts["classes"]} classes with written captions: shifted ones of the eight mini tasks, none of their own images, and letters, shapes, signs, textures and objects that no task has |
| training | contrastive, both ways; AdamW, warm-up and cosine in each phase: {phases} |
| seed | {facts["seed"]} |
| time | {facts["seconds"]:.0f} s |
| licence | the project's |
"""
