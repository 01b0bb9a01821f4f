"""The anatomy of networks that generate images: UNets and diffusion transformers of the diffusers library.

Torch-free: only names and sizes, as in ``mergesec.anatomy``. Three families are known:

* ``UNet2DConditionModel`` (Stable Diffusion 1 and 2, SDXL): transformers between residual blocks of convolutions. In
  each transformer block self-attention, cross-attention (keys and values read the text) and an MLP whose two halves
  are packed, value half first (GEGLU). Of a residual block the channels between its two convolutions are known:
  they can be reordered inside the groups of the norm between them, whole groups can change places and sign, and the
  rows that bring the time in move along. The stream of each transformer begins and ends inside of the network, so that its
  channels have an order of their own.
* ``DiTTransformer2DModel``: norms and gates follow from time and class; every block embeds both itself.
* ``SD3Transformer2DModel`` (an MMDiT): image and text tokens have maps of their own and one softmax, norms and gates
  follow from time and text; queries and keys may be normed (Stable Diffusion 3.5), and blocks may have a
  second attention of the image's own.

A fourth, ``with_single_modulation``, is the mini suite's: blocks as ``mergesec.anatomy`` knows them, whose norms and gates
follow from one map that all blocks share and a table of their own (adaLN-single).

Everything inside of the blocks that is not named here would break a symmetry and is refused. The order of the channels of
the stream between blocks, which conv_in or the patch embedding begins and the last map ends, is a symmetry that is not
listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from mergesec.parts import (
    Adaptive,
    Anatomy,
    AnatomyError,
    Attention,
    Axis,
    Block,
    Coordinates,
    HeadNorm,
    Linear,
    Mlp,
    Modulation,
    Norm,
    Projection,
    Shapes,
    Side,
    Terms,
)

Heads = int | Mapping[str, int]
"""The number of attention heads: one for all, or by the name of each attention."""

_UNET = re.compile(r"^(.*attentions\.\d+)\.transformer_blocks\.(\d+)\.attn1\.to_q\.weight$")
_FLAT = re.compile(r"^()transformer_blocks\.(\d+)\.attn1?\.to_q\.weight$")
_RESNET = re.compile(r"^(.*resnets\.\d+)\.conv1\.weight$")
_STREAM = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def describe_denoiser(shapes: Shapes, heads: Heads, groups: int = 32) -> Anatomy:
    """The anatomy of the diffusers network whose state dict has these names and shapes.

    ``heads``: one number, or a number per attention by name (``down_blocks.0.attentions.0.transformer_blocks.0.attn1``);
    ``groups``: the groups of a UNet's norms. Raises AnatomyError, naming the tensor, if nothing fits.
    """
    found = _Names(shapes, heads, groups)
    if "conv_in.weight" in shapes and any(_UNET.match(name) for name in shapes):
        return _unet(found)
    if "transformer_blocks.0.norm1_context.linear.weight" in shapes:
        return _mmdit(found)
    if "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight" in shapes:
        return _dit(found)
    sample = ", ".join(list(shapes)[:3]) or "nothing"
    raise AnatomyError(
        "unknown denoiser. Looked for a UNet with transformer blocks (conv_in, *.attentions.<i>.transformer_blocks), "
        "a DiT (transformer_blocks.0.norm1.emb) and an MMDiT (transformer_blocks.0.norm1_context). The names begin "
        f"with {sample}"
    )


# --------------------------------------------------------------------------- reading names


class _Names(NamedTuple):
    """Names and shapes, and what they do not tell."""

    shapes: Shapes
    heads: Heads
    groups: int

    def linear(self, module: str, rows: tuple[int, int] | None = None) -> Linear:
        """A linear map, or a convolution over single pixels."""
        weight, bias = f"{module}.weight", f"{module}.bias"
        shape = self.shapes.get(weight)
        if shape is None or len(shape) not in (2, 4) or shape[2:] not in ((), (1, 1)):
            told = "nothing" if shape is None else shape
            raise AnatomyError(f"looked for a linear map {weight}, found {told}")
        return Linear(weight, bias if bias in self.shapes else None, rows)

    def rows(self, module: str) -> int:
        return self.shapes[f"{module}.weight"][0]

    def columns(self, module: str) -> int:
        return self.shapes[f"{module}.weight"][1]

    def norm(self, module: str, grouped: bool = False) -> Norm | None:
        weight, bias = f"{module}.weight", f"{module}.bias"
        if weight not in self.shapes:
            return None
        return Norm(weight, bias if bias in self.shapes else None, grouped=grouped)

    def count(self, attention: str) -> int:
        count = self.heads if isinstance(self.heads, int) else self.heads.get(attention, 0)
        if count < 1:
            raise AnatomyError(f"{attention}: no number of heads is given for it")
        return count

    def stacked(self, module: str, parts: int) -> list[Modulation]:
        """The vectors that one map makes, its rows in equal parts."""
        linear, rows = self.linear(module), self.rows(module)
        if linear.bias is None or rows % parts:
            raise AnatomyError(f"{linear.weight}: {rows} rows and a bias should be {parts} vectors")
        size = rows // parts
        return [Modulation(self.linear(module, (i * size, (i + 1) * size))) for i in range(parts)]

    def refuse_strangers(self, block: str, known: Sequence[str]) -> None:
        """AnatomyError for a tensor of a block that none of its parts accounts for."""
        ends = {f"{module}.{end}" for module in known for end in ("weight", "bias")}
        for name in self.shapes:
            rest = name.removeprefix(f"{block}.")
            if rest != name and rest not in ends and not rest.startswith("norm1.emb."):
                raise AnatomyError(f"{name}: not part of any block that is known here")

    def axes(self, module: str, dim: int = 0, start: int = 0, telling: bool = False) -> list[Axis]:
        """Rows of a map with their bias, or its columns."""
        weight, bias = f"{module}.weight", f"{module}.bias"
        found = [Axis(weight, dim, start, telling=telling)]
        if dim == 0 and bias in self.shapes:
            found.append(Axis(bias, 0, start, telling=telling))
        return found


def _attention(
    names: _Names, module: str, maps: Sequence[str] = _STREAM, *, norm: Norm | None = None,
    adaptive: Adaptive | None = None, cross: bool = False, joint: Side | None = None,
) -> Attention:  # fmt: skip
    query, key, value, output = (names.linear(f"{module}.{name}") for name in maps)
    heads, width = names.count(module), names.rows(f"{module}.{maps[0]}")
    if width % heads:
        raise AnatomyError(f"{module}: {heads} heads do not divide the {width} rows of {query.weight}")
    for linear in (key, value):
        if names.shapes[linear.weight][0] != width:
            raise AnatomyError(f"{linear.weight} has {names.shapes[linear.weight][0]} rows, expected {width}")
    if names.shapes[output.weight][1] != width:
        raise AnatomyError(f"{output.weight} has {names.shapes[output.weight][1]} columns, expected {width}")
    return Attention(
        query, key, value, output, heads, width // heads, norm=norm, adaptive=adaptive,
        head_norm=_head_norm(names, module, "norm_q", "norm_k"), cross=cross, joint=joint,
    )  # fmt: skip


def _head_norm(names: _Names, module: str, query: str, key: str) -> HeadNorm | None:
    """Norms inside heads; refused where they are layer norms, which let fewer symmetries through."""
    found = f"{module}.{query}.weight", f"{module}.{key}.weight"
    held = [name in names.shapes for name in found]
    if not any(held):
        return None
    wrong = [n for n in found if n.replace("weight", "bias") in names.shapes]
    if wrong or not all(held):
        raise AnatomyError(
            f"{(wrong or found)[0]}: norms of queries and keys should be two RMS norms with gains and no biases"
        )
    return HeadNorm(*found)


def _mlp(names: _Names, module: str, *, norm: Norm | None = None, adaptive: Adaptive | None = None) -> Mlp:
    """``net.0.proj`` up, ``net.2`` down; twice as many rows as columns: value half, then gate (GEGLU)."""
    first, second = f"{module}.net.0.proj", f"{module}.net.2"
    up, down = names.linear(first), names.linear(second)
    rows, hidden = names.rows(first), names.columns(second)
    if rows == hidden:
        return Mlp(up, down, hidden, norm=norm, adaptive=adaptive)
    if rows != 2 * hidden:
        raise AnatomyError(
            f"{up.weight} has {rows} rows; the {hidden} columns of {down.weight} need as many or twice as many"
        )
    halves = names.linear(first, (0, hidden)), names.linear(first, (hidden, rows))
    return Mlp(halves[0], down, hidden, halves[1], norm=norm, adaptive=adaptive)


def _layers(names: _Names, pattern: re.Pattern[str]) -> dict[str, list[str]]:
    """Blocks by the transformer that holds them, in the order of the data."""
    found: dict[str, list[int]] = {}
    for name in names.shapes:
        if match := pattern.match(name):
            found.setdefault(match[1], []).append(int(match[2]))
    return {
        holder: [f"{holder}.transformer_blocks.{i}".lstrip(".") for i in sorted(numbers)]
        for holder, numbers in sorted(found.items(), key=lambda item: _place(item[0]))
    }


def _place(name: str) -> tuple[int, list[int]]:
    """Down blocks come first, then the middle, then up blocks."""
    first = ("down_blocks", "mid_block", "up_blocks")
    return next((i for i, part in enumerate(first) if name.startswith(part)), len(first)), [
        int(number) for number in re.findall(r"\d+", name)
    ]


# --------------------------------------------------------------------------- embeddings of the condition


def _embedder(names: _Names, module: str) -> Coordinates:
    """The hidden units of ``linear_2(silu(linear_1(x)))``."""
    axes = [*names.axes(f"{module}.linear_1", telling=True), *names.axes(f"{module}.linear_2", 1)]
    return Coordinates(f"{module}.linear_1", names.rows(f"{module}.linear_1"), tuple(axes))


def _embedding(
    names: _Names, modules: Sequence[str], tables: Sequence[str], readers: Sequence[str]
) -> list[Coordinates | Terms]:
    """The embedding of a condition: the sum of what ``modules`` and ``tables`` give, read by ``readers``."""
    width = names.rows(f"{modules[0]}.linear_2")
    axes = [Axis(f"{module}.linear_2.weight", telling=True) for module in modules]
    axes += [Axis(f"{module}.linear_2.bias") for module in modules]
    axes += [Axis(table, 1) for table in tables]
    axes += [axis for reader in readers for axis in names.axes(reader, 1)]
    for axis in axes:
        if axis.tensor not in names.shapes or names.shapes[axis.tensor][axis.dim] != width:
            raise AnatomyError(f"looked for {axis.tensor} with the {width} entries of an embedding")
    found: list[Coordinates | Terms] = [_embedder(names, module) for module in modules]
    found.append(Coordinates(f"{modules[0]}.linear_2", width, tuple(axes)))
    others = (*(f"{module}.linear_2.bias" for module in modules[1:]), *tables)
    return [*found, Terms(f"{modules[0]}.linear_2.bias", others)] if others else found


# --------------------------------------------------------------------------- UNet


def _unet(names: _Names) -> Anatomy:
    outside: list[Coordinates | Terms | Projection] = []
    modules = [m for m in ("time_embedding", "add_embedding") if f"{m}.linear_1.weight" in names.shapes]
    resnets = sorted((match[1] for name in names.shapes if (match := _RESNET.match(name))), key=_place)
    readers = [f"{resnet}.time_emb_proj" for resnet in resnets]
    if any(name.startswith("class_embedding.") for name in names.shapes):
        raise AnatomyError("class_embedding: UNets with embeddings of classes are not described")
    outside += _embedding(names, modules, (), readers)
    outside += [_channels(names, resnet) for resnet in resnets]
    blocks: list[Block] = []
    for holder, layers in _layers(names, _UNET).items():
        outside.append(Projection((names.linear(f"{holder}.proj_in"),), names.norm(f"{holder}.norm", True)))
        outside.append(_stream(names, holder, layers))
        blocks += [_unet_block(names, layer, len(blocks) + i) for i, layer in enumerate(layers)]
    return Anatomy(tuple(blocks), "diffusers UNet", tuple(outside), raw=True)


def _unet_block(names: _Names, layer: str, index: int) -> Block:
    norms = [names.norm(f"{layer}.norm{i}") for i in (1, 2, 3)]
    known = [f"attn{i}.{name}" for i in (1, 2) for name in _STREAM]
    names.refuse_strangers(layer, [*known, "norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"])
    return Block(
        index,
        _attention(names, f"{layer}.attn1", norm=norms[0]),
        _mlp(names, f"{layer}.ff", norm=norms[2]),
        layer,
        (_attention(names, f"{layer}.attn2", norm=norms[1], cross=True),),
    )


def _stream(names: _Names, holder: str, layers: Sequence[str]) -> Coordinates:
    """The channels of the stream of one transformer inside a UNet."""
    axes = names.axes(f"{holder}.proj_in", telling=True)
    for layer in layers:
        for reader in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "ff.net.0.proj"):
            axes += names.axes(f"{layer}.{reader}", 1)
        for rows in ("norm1", "norm2", "norm3", "attn1.to_out.0", "attn2.to_out.0", "ff.net.2"):
            axes += names.axes(f"{layer}.{rows}")
    axes += names.axes(f"{holder}.proj_out", 1, telling=True)
    return Coordinates(f"{holder}.proj_in", names.rows(f"{holder}.proj_in"), tuple(axes))


def _channels(names: _Names, resnet: str) -> Coordinates:
    """The channels between the two convolutions of a residual block."""
    size, time = names.rows(f"{resnet}.conv1"), names.rows(f"{resnet}.time_emb_proj")
    if size % names.groups or names.shapes[f"{resnet}.norm2.weight"] != (size,):
        raise AnatomyError(
            f"{resnet}: {names.groups} groups do not divide the {size} channels of its second norm"
        )
    if time not in (size, 2 * size):
        raise AnatomyError(f"{resnet}.time_emb_proj.weight has {time} rows, expected {size} or {2 * size}")
    before = [f"{resnet}.conv1.weight", f"{resnet}.conv1.bias"]
    if time == size:  # added before the norm; else it scales and shifts what is normed
        before += [f"{resnet}.time_emb_proj.weight", f"{resnet}.time_emb_proj.bias"]
    axes = [Axis(name, signed=True, scaled=True, telling=True) for name in before]
    if time != size:
        for start in (0, size):
            axes += names.axes(f"{resnet}.time_emb_proj", start=start, telling=True)
    axes += [Axis(f"{resnet}.norm2.weight", signed=True), Axis(f"{resnet}.norm2.bias", telling=True)]
    axes.append(Axis(f"{resnet}.conv2.weight", 1, telling=True))
    for axis in axes:
        if axis.tensor not in names.shapes:
            raise AnatomyError(f"looked for {axis.tensor}, found nothing")
    return Coordinates(f"{resnet}.conv1", size, tuple(axes), names.groups)


# --------------------------------------------------------------------------- DiT, MMDiT


def _dit(names: _Names) -> Anatomy:
    outside: list[Coordinates | Terms | Projection] = []
    blocks: list[Block] = []
    (layers,) = _layers(names, _FLAT).values()
    for index, layer in enumerate(layers):
        embedder = f"{layer}.norm1.emb"
        readers = [
            f"{layer}.norm1.linear",
            *(["proj_out_1"] if index == 0 else []),
        ]  # the last norm asks block 0
        table = f"{embedder}.class_embedder.embedding_table.weight"
        outside += _embedding(names, [f"{embedder}.timestep_embedder"], [table], readers)
        first, second = _two_norms(names.stacked(f"{layer}.norm1.linear", 6))
        known = [*(f"attn1.{name}" for name in _STREAM), "ff.net.0.proj", "ff.net.2", "norm1.linear"]
        names.refuse_strangers(layer, known)
        attention = _attention(names, f"{layer}.attn1", adaptive=first)
        blocks.append(Block(index, attention, _mlp(names, f"{layer}.ff", adaptive=second), layer))
    shift, scale = names.stacked("proj_out_1", 2)
    outside.append(Projection((names.linear("proj_out_2"),), adaptive=Adaptive(scale, shift)))
    return Anatomy(tuple(blocks), "diffusers DiT", tuple(outside))


def _two_norms(vectors: Sequence[Modulation]) -> tuple[Adaptive, Adaptive]:
    """Of attention and MLP, from their shifts, scales and gates in this order."""
    first, second = (Adaptive(vectors[i + 1], vectors[i], vectors[i + 2]) for i in (0, 3))
    return first, second


def _mmdit(names: _Names) -> Anatomy:
    (layers,) = _layers(names, _FLAT).values()
    blocks = [_mmdit_block(names, layer, index) for index, layer in enumerate(layers)]
    readers = [f"{layer}.{norm}.linear" for layer in layers for norm in ("norm1", "norm1_context")]
    modules = [f"time_text_embed.{name}_embedder" for name in ("timestep", "text")]
    outside: list[Coordinates | Terms | Projection] = [
        *_embedding(names, modules, (), [*readers, "norm_out.linear"])
    ]
    scale, shift = names.stacked("norm_out.linear", 2)
    outside.append(Projection((names.linear("proj_out"),), adaptive=Adaptive(scale, shift)))
    return Anatomy(tuple(blocks), "diffusers MMDiT", tuple(outside))


def _mmdit_block(names: _Names, layer: str, index: int) -> Block:
    width = names.columns(f"{layer}.norm1.linear")
    twice = f"{layer}.attn2.to_q.weight" in names.shapes
    vectors = names.stacked(f"{layer}.norm1.linear", 9 if twice else 6)
    first, second = _two_norms(vectors)
    last = names.rows(f"{layer}.norm1_context.linear") == 2 * width
    names.refuse_strangers(layer, _known_of_mmdit(twice, last))
    side, text_mlp = _text_side(names, layer, last)
    attention = _attention(names, f"{layer}.attn", adaptive=first, joint=side)
    more: list[Attention | Mlp] = []
    if twice:
        third = Adaptive(vectors[7], vectors[6], vectors[8])
        more.append(_attention(names, f"{layer}.attn2", adaptive=third))
    more += [text_mlp] if text_mlp is not None else []
    return Block(index, attention, _mlp(names, f"{layer}.ff", adaptive=second), layer, tuple(more))


def _text_side(names: _Names, layer: str, last: bool) -> tuple[Side, Mlp | None]:
    """The text's maps of a joint attention, and its MLP; in the last block nothing reads the text any more."""
    module = f"{layer}.attn"
    query, key, value = (names.linear(f"{module}.{name}") for name in _TEXT[:3])
    head_norm = _head_norm(names, module, "norm_added_q", "norm_added_k")
    if last:
        scale, shift = names.stacked(f"{layer}.norm1_context.linear", 2)
        return Side(query, key, value, None, adaptive=Adaptive(scale, shift), head_norm=head_norm), None
    first, second = _two_norms(names.stacked(f"{layer}.norm1_context.linear", 6))
    output = names.linear(f"{module}.{_TEXT[3]}")
    side = Side(query, key, value, output, adaptive=first, head_norm=head_norm)
    return side, _mlp(names, f"{layer}.ff_context", adaptive=second)


def _known_of_mmdit(twice: bool, last: bool) -> list[str]:
    known = [f"attn.{name}" for name in (*_STREAM, *_TEXT)]
    known += [f"attn.{norm}" for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    known += [f"attn2.{name}" for name in (*_STREAM, "norm_q", "norm_k")] * twice
    known += ["norm1.linear", "norm1_context.linear", "ff.net.0.proj", "ff.net.2"]
    return known + ["ff_context.net.0.proj", "ff_context.net.2"] * (not last)


# --------------------------------------------------------------------------- adaLN-single


def with_single_modulation(shapes: Shapes, anatomy: Anatomy) -> Anatomy:
    """``anatomy`` with adaptive norms, where ``modulate`` makes shift, scale and gate of attention and MLP for all
    blocks, and each block's ``modulation`` ``[6, d]`` is added; as it is where there are none.

    The embedding of the time is ``time.0``, SiLU, ``time.2``. Its sum with the condition's words has no order of
    its own: the words are added to every token, too.
    """
    tables = [f"{block.name}.modulation" for block in anatomy.blocks]
    if "modulate.weight" not in shapes or not set(tables) <= shapes.keys():
        return anatomy
    names = _Names(shapes, 1, 1)
    vectors = names.stacked("modulate", 6)
    blocks = []
    for block, table in zip(anatomy.blocks, tables, strict=True):
        width = shapes[block.attention.query.weight][1]
        if shapes[table] != (6, width) or shapes["modulate.weight"][0] != 6 * width:
            raise AnatomyError(f"{table} has shape {shapes[table]}, expected {(6, width)}")
        first, second = _two_norms([replace(v, table=table, row=i) for i, v in enumerate(vectors)])
        attention, mlp = replace(block.attention, adaptive=first), replace(block.mlp, adaptive=second)
        blocks.append(replace(block, attention=attention, mlp=mlp))
    outside: list[Coordinates | Terms | Projection] = []
    if "time.0.weight" in shapes and "time.2.weight" in shapes:
        axes = [*names.axes("time.0", telling=True), *names.axes("time.2", 1)]
        outside.append(Coordinates("time.0", names.rows("time.0"), tuple(axes)))
    outside.append(Terms("modulate.bias", tuple(tables)))
    return replace(anatomy, blocks=tuple(blocks), outside=tuple(outside))
