"""Pictures of triggered samples: a row per attack, images with their amplified change, or texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mergesec.figures.canvas import (
    GREY,
    Caption,
    Picture,
    bare,
    file_stem,
    gap,
    numbered,
    part,
    sheet,
    strip,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mergesec.evidence.records import Record
    from mergesec.figures.samples import Samples, Triggered

STEM = "backdoor-samples"
AMPLIFIED = 5.0
_SIDE, _LABEL, _BETWEEN, _SPACE, _NAMES = 0.72, 2.1, 0.25, 0.07, 0.45
"""Inches: an image, the column of labels, between columns, between rows, names above the first row."""
_LETTERS = 46
_LINE = 0.12
_SHOWN = 150
"""Letters of a text that are shown around what the trigger changed."""


def sample_pictures(found: Sequence[Samples]) -> Iterator[Picture]:
    """A picture per aim; parted if too tall."""
    for samples in found:
        aim = samples.aim
        off = "" if aim.task == aim.subject else f", trigger made for {aim.subject}"
        what = f"Triggered test inputs of {aim.task}{off}, target class {samples.target}"
        stem = "-".join(map(file_stem, dict.fromkeys([aim.task, aim.subject])))
        name = f"{STEM}-{stem}-{aim.target_class}"
        yield from _DRAW[samples.modality](name, what, samples)


def told(visibility: Mapping[str, float]) -> str:
    """Measures of a trigger's visibility in words."""
    known: dict[str, Callable[[float], str]] = {
        "area": lambda v: f"area {100 * v:.3g} %",
        "l2": lambda v: f"RMS {v:.3f}",
        "ssim": lambda v: f"SSIM {v:.3f}",
        "changed": lambda v: f"changed {100 * v:.0f} % of texts",
        "tokens": lambda v: f"{v:+.1f} words",
    }
    return ", ".join(text(visibility[name]) for name, text in known.items() if name in visibility)


# --------------------------------------------------------------------------- images


def _images(name: str, what: str, samples: Samples) -> Iterator[Picture]:
    count, _, height, width = samples.inputs.shape
    wide = count * _SIDE
    tall = wide * height / (count * (width + gap(width)) - gap(width))
    lines = {id(row): max(tall, _LINE * len(_label(row))) + _SPACE for row in samples.rows}
    pages = part(samples.rows, lambda row: lines[id(row)])
    note = (
        f"Right: the change × {AMPLIFIED:g} about grey. Area: share of pixels that change; RMS: root mean square "
        "change, full brightness 1; SSIM: structural similarity, 1 = the same (its windows lie inside the image, so marks in corners hardly lower it); "
        "means over up to 256 test images."
    )
    clean = samples.inputs.cpu().numpy()
    for page, rows in enumerate(pages):
        heights = [tall + _SPACE, *(lines[id(row)] for row in rows)]
        figure, panels = _laid_out(heights, [wide, wide], what, samples.records, note)
        strip(panels[0, 0], clean)
        _name_row(panels[0, 0], ["test images"])
        _name_columns(panels[0, 0], samples.classes, width)
        panels[0, 1].set_axis_off()
        for row, axes in zip(rows, panels[1:], strict=True):
            after = row.inputs.numpy()
            strip(axes[0], after)
            strip(axes[1], np.clip(0.5 + AMPLIFIED * (after - clean), 0.0, 1.0))
            _name_row(axes[0], _label(row))
        yield Picture(numbered(name, page, len(pages)), figure)


def _laid_out(
    heights: Sequence[float], widths: Sequence[float], what: str, records: Sequence[Record], note: str
) -> tuple[Figure, NDArray[Any]]:
    """Panels ``[rows, columns]`` of these inches beside the column of labels, below a row's room for names."""
    # what is drawn of a cell does not wait for its evaluations
    caption = Caption.of([r.model_copy(update={"status": "done"}) for r in records])
    size = (_LABEL + sum(widths) + _BETWEEN * len(widths), sum(heights) + _NAMES)
    figure, panels = sheet(size, (len(heights), len(widths)), what, caption, note)
    figure.set_layout_engine("none")
    full_wide, full_tall = (float(side) for side in figure.get_size_inches())
    foot = figure.get_supxlabel()
    bottom = 0.2 + 0.13 * (foot.count("\n") + 1) if foot else 0.1
    tops = bottom + sum(heights) - np.cumsum([0.0, *heights[:-1]])
    lefts = _LABEL + np.cumsum([0.0, *(width + _BETWEEN for width in widths[:-1])])
    for top, height, line in zip(tops, heights, panels, strict=True):
        for left, width, ax in zip(lefts, widths, line, strict=True):
            inner = height - _SPACE
            box = (left / full_wide, (top - inner) / full_tall, width / full_wide, inner / full_tall)
            ax.set_position(box)
    return figure, panels


def _label(row: Triggered) -> list[str]:
    measures = told(row.visibility)
    return [*wrapped(row.attack, 34), *wrapped(measures, 34)] if measures else wrapped(row.attack, 34)


def _name_row(ax: Axes, lines: Sequence[str]) -> None:
    ax.set_ylabel(
        "\n".join(lines), rotation=0, ha="right", va="center", fontsize=6.5, linespacing=1.25, labelpad=6
    )


def _name_columns(ax: Axes, classes: Sequence[str], width: int) -> None:
    """Classes above their images."""
    step = width + gap(width)
    names = ["\n".join(wrapped(name, 13)) for name in classes]
    ax.set_xticks([i * step + width / 2 - 0.5 for i in range(len(names))], names, fontsize=5.5)
    ax.tick_params(length=0, pad=2, labeltop=True, labelbottom=False)


# --------------------------------------------------------------------------- texts


def _texts(name: str, what: str, samples: Samples) -> Iterator[Picture]:
    """A row per attack, a column per text; guillemets mark what the trigger put in."""
    count = len(samples.inputs)
    clean = [wrapped(_around(text.split(), 0), _LETTERS) for text in samples.inputs]
    first = [
        [*wrapped(f"[{label}]", _LETTERS), *text] for label, text in zip(samples.classes, clean, strict=True)
    ]
    cells = {
        id(row): [
            wrapped(marked(before, after), _LETTERS)
            for before, after in zip(samples.inputs, row.inputs, strict=True)
        ]
        for row in samples.rows
    }

    def tall(lines: Sequence[Sequence[str]], label: Sequence[str]) -> float:
        return _LINE * max(*map(len, lines), len(label)) + 0.12 + _SPACE

    pages = part(samples.rows, lambda row: tall(cells[id(row)], _label(row)))
    note = "« » mark what the trigger put in; long texts are cut to what is around it. Measures: means over up to 256 test texts."
    for page, rows in enumerate(pages):
        heights = [tall(first, []), *(tall(cells[id(row)], _label(row)) for row in rows)]
        figure, panels = _laid_out(heights, [2.7 * count], what, samples.records, note)
        _write(panels[0, 0], first, GREY)
        _name_row(panels[0, 0], ["test texts"])
        for row, (ax,) in zip(rows, panels[1:], strict=True):
            _write(ax, cells[id(row)], "#1a1a1a")
            _name_row(ax, _label(row))
        yield Picture(numbered(name, page, len(pages)), figure)


def _write(ax: Axes, texts: Sequence[Sequence[str]], ink: str) -> None:
    for i, lines in enumerate(texts):
        ax.annotate(
            "\n".join(lines), (i / len(texts), 1.0), (0, -5), xycoords="axes fraction", textcoords="offset points",
            ha="left", va="top", fontsize=6.5, linespacing=1.25, color=ink, annotation_clip=False,
        )  # fmt: skip
    bare(ax)
    ax.spines["top"].set_visible(True)


def marked(before: str, after: str) -> str:
    """``after`` with « » around the words that ``before`` lacks, cut to about 150 letters around the first."""
    old, new = before.split(), after.split()
    words: list[str] = []
    first = 0
    for kind, _, _, start, end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            words += new[start:end]
        elif start < end:
            first = first or len(words) + 1
            words.append(f"«{' '.join(new[start:end])}»")
    return _around(words, max(0, first - 1))


def _around(words: Sequence[str], middle: int) -> str:
    """As many words around the ``middle``-th as fit, with … where words were cut off."""
    low = high = middle
    while high - low < len(words):
        longer = (max(0, low - 1), min(len(words), high + 1))
        if len(" ".join(words[longer[0] : longer[1]])) > _SHOWN and high > low:
            break
        low, high = longer
    cut = ["…"] if low else [], ["…"] if high < len(words) else []
    return " ".join([*cut[0], *words[low:high], *cut[1]])


_DRAW: dict[str, Callable[[str, str, Samples], Iterator[Picture]]] = {"image": _images, "text": _texts}
"""By modality."""
