"""Which tensors of a transformer are what, and which symmetries they carry.

Protection, re-alignment and head-wise attacks are written once against this page, not once per
model class. Torch-free: only names and sizes.

A layout is listed here only if its blocks carry both symmetries: hidden units of the MLP can be
reordered, and each attention head's query/key and value/output pairs can be changed by an
invertible matrix. Tensors inside an attention or MLP module that the row does not name (query/key
norms, relative positions, head scales) break a symmetry and are refused.

Denoisers (UNets, diffusion transformers) are described by ``describe_denoiser``; their kinds of symmetries are here.

Three kinds of attention allow less. Where several query heads share one key and value head (grouped
heads), they share its matrices. Where queries and keys are rotated by their positions, only what
commutes with every rotation of the pairs (i, i + head_dim/2) is allowed on them: one complex factor
per pair; value and output stay general. Where queries and keys are normed inside each head, only what commutes
with the norm is: signs, one order of the dimensions for all heads, and a positive factor. Rotary positions leave no tensor behind that would tell (nor
would other pairings, or rotations of part of a head), so whoever asks for the anatomy has to say.

Around the maps stand norms, biases and layer scales, which carry symmetries of their own; ``symmetries`` lists
all that a network's blocks have, ``mergesec.surgery`` applies them. Symmetries that pass through the whole
residual stream (an order or rotation of all its coordinates) are not among them: they change what the head
reads, and the head is not part of what is published.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from mergesec.denoisers import describe_denoiser as describe_denoiser
from mergesec.denoisers import with_single_modulation
from mergesec.parts import Adaptive as Adaptive
from mergesec.parts import Anatomy as Anatomy
from mergesec.parts import AnatomyError as AnatomyError
from mergesec.parts import Attention as Attention
from mergesec.parts import Axis as Axis
from mergesec.parts import Block as Block
from mergesec.parts import Coordinates as Coordinates
from mergesec.parts import HeadNorm as HeadNorm
from mergesec.parts import Linear as Linear
from mergesec.parts import Mlp as Mlp
from mergesec.parts import Modulation as Modulation
from mergesec.parts import Norm as Norm
from mergesec.parts import Part as Part
from mergesec.parts import Projection as Projection
from mergesec.parts import Shapes as Shapes
from mergesec.parts import Side as Side
from mergesec.parts import Terms as Terms

# --------------------------------------------------------------------------- symmetries


class Kind(StrEnum):
    """The kinds of changes of a block's weights that keep its function.

    γ and β are a norm's weight and bias, λ a layer scale, D and s vectors, 1 the vector of ones.
    """

    HIDDEN_ORDER = "hidden_order"
    """Hidden units in another order."""
    UNIT_SCALE = "unit_scale"
    """Gated MLP: an up row times any number but 0, its down column divided by it."""
    HEAD_ORDER = "head_order"
    """Heads in another order; grouped heads move with their group."""
    QUERY_KEY = "query_key"
    """T on a head's queries, T⁻ᵀ on its keys; under rotary positions one complex number per pair."""
    VALUE_OUTPUT = "value_output"
    """S on a head's values, S⁻¹ on its columns of the output."""
    VALUE_SHIFT = "value_shift"
    """b_v + c per head; attention weights sum to 1, so the output bias takes W_o c off again."""
    KEY_SHIFT = "key_shift"
    """b_k + c per head: the same score more for every key of a query, which softmax cancels."""
    NORM_SCALE = "norm_scale"
    """γ and β times D, columns of the maps that read them divided by D. Adaptive norms: rows and tables of scale and
    shift times D, the scale's bias b to D (1 + b) − 1."""
    NORM_SHIFT = "norm_shift"
    """β + s, and W s off the biases of the maps that read it. Adaptive norms: the shift's bias, or its table."""
    READER_MEAN = "reader_mean"
    """Rows of maps that read a centred norm: any multiple of 1/γ more (x̂ has mean 0), the bias corrected."""
    WRITER_MEAN = "writer_mean"
    """What a map writes: any multiple of 1 more (through a layer scale: of 1/λ); every norm takes it away."""
    LAYER_SCALE = "layer_scale"
    """λ divided by D, rows and bias of the map before it times D. Where λ follows from a condition (the gate of an
    adaptive norm) its rows are."""
    QK_SIGN = "qk_sign"
    """Normed queries and keys: signs of a head's dimensions, on both alike."""
    QK_ORDER = "qk_order"
    """Normed queries and keys: dimensions in another order, the same in all heads since they share the gains."""
    QK_GAIN = "qk_gain"
    """Normed queries and keys: the queries' gains times D, the keys' divided by D."""
    QK_SCALE = "qk_scale"
    """Normed queries and keys: a head's rows times a positive number, queries and keys apart (up to the norm's ε)."""
    CHANNEL_ORDER = "channel_order"
    """Channels between two convolutions, coordinates of the condition's embedding or of the stream of a transformer
    inside a UNet in another order; groups of a group norm stay together."""
    GROUP_SIGN = "group_sign"
    """The sign of all channels of a group, and of their γ in the group norm."""
    GROUP_SCALE = "group_scale"
    """All channels of a group times a positive number, which its group norm takes away (up to the norm's ε)."""
    TERM_SHIFT = "term_shift"
    """A constant from one term of a sum to the others: biases of embeddings, tables of modulations."""


NEEDS: Mapping[Kind, str] = {
    Kind.UNIT_SCALE: "a gated MLP (an activation between up and down lets no other factor through)",
    Kind.VALUE_SHIFT: "biases on the value and the output map",
    Kind.KEY_SHIFT: "a bias on the key map, and no rotary positions (a rotated shift is another for every key)",
    Kind.NORM_SCALE: "norms that nothing but the maps behind them reads (not norms after the sum)",
    Kind.NORM_SHIFT: "norms with a bias that only maps with biases read",
    Kind.READER_MEAN: "norms that take the mean away (layer norms), read by maps with biases",
    Kind.WRITER_MEAN: "norms that take the mean away (layer norms) everywhere",
    Kind.LAYER_SCALE: "layer scales, or gates of adaptive norms",
    Kind.QUERY_KEY: "an attention without norms on its queries and keys",
    Kind.QK_SIGN: "norms on queries and keys",
    Kind.QK_ORDER: "norms on queries and keys",
    Kind.QK_GAIN: "norms on queries and keys",
    Kind.QK_SCALE: "norms on queries and keys",
    Kind.CHANNEL_ORDER: "convolutions with a norm between them, or an embedding of a condition",
    Kind.GROUP_SIGN: "two convolutions with a group norm between them",
    Kind.GROUP_SCALE: "two convolutions with a group norm between them",
    Kind.TERM_SHIFT: "a sum of two terms that have a bias or a table each",
}
"""What a network must have for a kind; the kinds that are not here every network has."""

UP_TO_EPSILON = frozenset({Kind.QK_SCALE, Kind.GROUP_SCALE})
"""Kinds that keep the function but for the ε inside a norm: a factor above 1 makes ε count for less, below 1 for more."""


@dataclass(frozen=True)
class Symmetry:
    """One generator of the group: a kind, the part that it acts on, and the block that this is in.

    ``block`` is None outside of the blocks. ``kin`` are other parts that change with this one, since they share its
    modulation.
    """

    kind: Kind
    block: Block | None
    part: Part | Coordinates | Terms
    kin: tuple[Part, ...] = ()

    @property
    def borders(self) -> tuple[Part, ...]:
        """The parts that a change of a norm or of a layer scale goes through."""
        return () if isinstance(self.part, Coordinates | Terms) else (self.part, *self.kin)


def symmetries(anatomy: Anatomy) -> tuple[Symmetry, ...]:
    """All generators of the group under which the function of these blocks does not change: those outside of the
    blocks, and those that blocks share; then block by block.

    Any element of the group is a product of elements of the generators, in any order. WRITER_MEAN presumes that
    the norm behind the last block is centred as the others are.
    """
    parts = [part for block in anatomy.blocks for part in block.parts]
    centred = not anatomy.raw and all(part.norm is not None and part.norm.centred for part in parts)
    return (
        *_outside(anatomy),
        *_shared(anatomy),
        *(
            Symmetry(kind, block, part)
            for block in anatomy.blocks
            for part in _with_sides(block)
            for kind in _kinds(part, centred)
        ),
    )


def _outside(anatomy: Anatomy) -> Iterator[Symmetry]:
    for part in anatomy.outside:
        if isinstance(part, Coordinates):
            kinds = [Kind.CHANNEL_ORDER] + [Kind.GROUP_SIGN, Kind.GROUP_SCALE] * part.signed
        elif isinstance(part, Terms):
            kinds = [Kind.TERM_SHIFT]
        else:
            kinds = _border_kinds(part, False)
        yield from (Symmetry(kind, None, part) for kind in kinds)


def _shared(anatomy: Anatomy) -> Iterator[Symmetry]:
    """Scales of modulations whose map all blocks share."""
    borders = [part for block in anatomy.blocks for part in _with_sides(block) if _shares(part)]
    for kind in (Kind.NORM_SCALE, Kind.LAYER_SCALE):
        families: dict[Linear, list[Part]] = {}
        for part in borders:
            assert part.adaptive is not None  # what _shares asks for
            of = part.adaptive.scale if kind is Kind.NORM_SCALE else part.adaptive.gate
            if of is not None:
                families.setdefault(of.linear, []).append(part)
        for first, *kin in families.values():
            yield Symmetry(kind, None, first, tuple(kin))


def _shares(part: Part) -> bool:
    return part.adaptive is not None and part.adaptive.scale.table is not None


def _with_sides(block: Block) -> Iterator[Attention | Mlp | Side]:
    for part in block.parts:
        yield from part.sides if isinstance(part, Attention) else (part,)


def _kinds(part: Attention | Mlp | Side, centred: bool) -> list[Kind]:
    inner = _attention_kinds(part) if isinstance(part, Attention) else []
    inner += _mlp_kinds(part) if isinstance(part, Mlp) else []
    return inner + _border_kinds(part, centred)


def _mlp_kinds(mlp: Mlp) -> list[Kind]:
    return [Kind.HIDDEN_ORDER] + [Kind.UNIT_SCALE] * (mlp.gate is not None)


def _attention_kinds(attention: Attention) -> list[Kind]:
    kinds = [Kind.HEAD_ORDER]
    if attention.head_norm is None:
        kinds.append(Kind.QUERY_KEY)
    kinds.append(Kind.VALUE_OUTPUT)
    sides = attention.sides
    if all(side.value.bias and (side.output is None or side.output.bias) for side in sides):
        kinds.append(Kind.VALUE_SHIFT)
    if all(side.key.bias for side in sides) and not attention.rotary and attention.head_norm is None:
        kinds.append(Kind.KEY_SHIFT)
    if attention.head_norm is not None:
        kinds += [Kind.QK_SIGN, Kind.QK_ORDER, Kind.QK_GAIN, Kind.QK_SCALE]
    return kinds


def _border_kinds(part: Part, centred: bool) -> list[Kind]:
    """Kinds between the part and what is before and behind it."""
    kinds, biased = [], all(linear.bias for linear in part.readers)
    if part.adaptive is not None:
        kinds += [Kind.NORM_SCALE] * (not _shares(part)) + [Kind.NORM_SHIFT] * biased
        gated = part.adaptive.gate is not None and part.writer is not None
        return kinds + [Kind.LAYER_SCALE] * (gated and not _shares(part))
    if part.norm is not None and part.norm.own:
        kinds.append(Kind.NORM_SCALE)
        if part.norm.bias and biased:
            kinds.append(Kind.NORM_SHIFT)
    if part.norm is not None and part.norm.centred and biased:
        kinds.append(Kind.READER_MEAN)
    if centred:
        kinds.append(Kind.WRITER_MEAN)
    return kinds + [Kind.LAYER_SCALE] * (part.scale is not None)


# --------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """One row of the table: what a family calls its tensors, relative to a block.

    ``layers`` is the module list the blocks are in. Equal names mean packed rows, in the order
    (query, key, value) and (gate, up). ``neutral`` lists tensors of the same modules that carry no
    hidden or head coordinates. ``norms`` are the modules that attention and MLP read, ``scales`` their layer
    scales; both may be missing from a network. With ``first`` the norms come after the sums: the attention then
    reads the norm of the block before, in the first block the one named here.
    """

    name: str
    layers: str
    query: str
    key: str
    value: str
    output: str
    up: str
    down: str
    gate: str = ""
    neutral: tuple[str, ...] = ()
    rotary: bool = False
    norms: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()
    first: str = ""


def _row(
    name: str,
    layers: str,
    qkv: str,
    output: str,
    mlp: str,
    norms: str,
    *,
    scales: str = "",
    neutral: str = "",
    first: str = "",
    rotary: bool = False,
) -> Layout:
    """A row from space-separated names; ``mlp`` is ``up down`` or ``up down gate``."""
    query, key, value = qkv.split() if " " in qkv else (qkv, qkv, qkv)
    up, down, gate = [*mlp.split(), ""][:3]
    return Layout(
        *(name, layers, query, key, value, output, up, down, gate),
        neutral=tuple(neutral.split()),
        rotary=rotary,
        norms=tuple(norms.split()),
        scales=tuple(scales.split()),
        first=first,
    )


def _attention(prefix: str, names: str) -> str:
    return " ".join(f"{prefix}{name}.weight" for name in names.split())


_QUERY_KEY_VALUE = "query key value"
_PROJ = "q_proj k_proj v_proj"
_FC = "mlp.fc1.weight mlp.fc2.weight"

_NORMS = "norm1 norm2"
_DINOV2_SCALES = "layer_scale1.lambda1 layer_scale2.lambda1"

LAYOUTS: tuple[Layout, ...] = (
    _row(
        "mini ViT",
        "blocks",
        _attention("attn.", "q k v"),
        "attn.o.weight",
        "mlp.up.weight mlp.down.weight",
        _NORMS,
    ),
    _row(
        "HF CLIP",
        "encoder.layers",
        _attention("self_attn.", _PROJ),
        "self_attn.out_proj.weight",
        _FC,
        "layer_norm1 layer_norm2",
    ),
    _row(
        "HF ViT (transformers 5)",
        "layers",
        _attention("attention.", _PROJ),
        "attention.o_proj.weight",
        _FC,
        "layernorm_before layernorm_after",
    ),
    _row(
        "HF ViT (transformers 4)",
        "encoder.layer",
        _attention("attention.attention.", _QUERY_KEY_VALUE),
        "attention.output.dense.weight",
        "intermediate.dense.weight output.dense.weight",
        "layernorm_before layernorm_after",
    ),
    _row(
        "HF DINOv2 (transformers 5)",
        "encoder.layer",
        _attention("attention.", _PROJ),
        "attention.o_proj.weight",
        _FC,
        _NORMS,
        scales=_DINOV2_SCALES,
    ),
    _row(
        "HF DINOv2 (transformers 4)",
        "encoder.layer",
        _attention("attention.attention.", _QUERY_KEY_VALUE),
        "attention.output.dense.weight",
        _FC,
        _NORMS,
        scales=_DINOV2_SCALES,
    ),
    _row(
        "HF DINOv2 SwiGLU (transformers 5)",
        "encoder.layer",
        _attention("attention.", _PROJ),
        "attention.o_proj.weight",
        "mlp.up_proj.weight mlp.down_proj.weight mlp.gate_proj.weight",
        _NORMS,
        scales=_DINOV2_SCALES,
    ),
    _row(
        "HF DINOv2 SwiGLU (transformers 4)",
        "encoder.layer",
        _attention("attention.attention.", _QUERY_KEY_VALUE),
        "attention.output.dense.weight",
        "mlp.weights_in.weight mlp.weights_out.weight mlp.weights_in.weight",
        _NORMS,
        scales=_DINOV2_SCALES,
    ),
    _row(
        "HF BERT",
        "encoder.layer",
        _attention("attention.self.", _QUERY_KEY_VALUE),
        "attention.output.dense.weight",
        "intermediate.dense.weight output.dense.weight",
        "output.LayerNorm attention.output.LayerNorm",
        neutral="attention.output.LayerNorm.weight attention.output.LayerNorm.bias "
        "output.LayerNorm.weight output.LayerNorm.bias",
        first="embeddings.LayerNorm",
    ),
    _row(
        "HF DistilBERT",
        "transformer.layer",
        _attention("attention.", "q_lin k_lin v_lin"),
        "attention.out_lin.weight",
        "ffn.lin1.weight ffn.lin2.weight",
        "output_layer_norm sa_layer_norm",
        first="embeddings.LayerNorm",
    ),
    # GPT-2 as Hugging Face stores it has these maps transposed; a backbone has to turn them first
    _row(
        "HF GPT-2 (maps as nn.Linear)",
        "h",
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight mlp.c_proj.weight",
        "ln_1 ln_2",
    ),
    _row(
        "open_clip",
        "resblocks",
        "attn.in_proj_weight",
        "attn.out_proj.weight",
        "mlp.c_fc.weight mlp.c_proj.weight",
        "ln_1 ln_2",
        scales="ls_1.gamma ls_2.gamma",
    ),
    _row(
        "timm ViT",
        "blocks",
        "attn.qkv.weight",
        "attn.proj.weight",
        _FC,
        _NORMS,
        scales="ls1.gamma ls2.gamma",
    ),
    # Gemma multiplies by 1 + weight: what rescales norms must not be used on it
    _row(
        "HF Llama, Mistral, Qwen2, Gemma",
        "layers",
        _attention("self_attn.", _PROJ),
        "self_attn.o_proj.weight",
        "mlp.up_proj.weight mlp.down_proj.weight mlp.gate_proj.weight",
        "input_layernorm post_attention_layernorm",
        neutral="self_attn.rotary_emb.inv_freq",
        rotary=True,
    ),
)


def describe(shapes: Shapes, heads: int | Mapping[str, int], rotary: bool = False) -> Anatomy:
    """The anatomy of the network whose state dict has these names and shapes.

    ``heads`` is the number of attention heads: one number for every block, or, for a network with
    several towers, a number per name prefix (``{"vision_model.": 12}`` describes that tower only). The
    number of key and value heads follows from their rows. ``rotary`` says that queries and keys are rotated
    by position in pairs (i, i + head_dim/2), over whole heads, as Hugging Face's Llama does it; the rows of
    the table that are rotary fit only then, and the others only without.

    Raises AnatomyError if no layout of the table fits, or sizes contradict it.
    """
    blocks: list[Block] = []
    used: list[str] = []
    for layout in LAYOUTS:
        if layout.rotary != rotary:
            continue
        for prefix, layers in _towers(shapes, layout).items():
            count = heads if isinstance(heads, int) else heads.get(prefix)
            if count is None:
                continue
            used.append(layout.name)
            before = prefix + layout.first
            for layer in layers:
                blocks.append(_block(shapes, layout, layer, count, len(blocks), before))
                before = f"{layer}{layout.norms[0]}"
    if not blocks:
        raise AnatomyError(_nothing_found(shapes, heads, rotary))
    return with_single_modulation(shapes, Anatomy(tuple(blocks), " + ".join(dict.fromkeys(used))))


def _towers(shapes: Shapes, layout: Layout) -> dict[str, list[str]]:
    """Towers of this layout: name prefix -> prefixes of its blocks, in order."""
    stem = re.compile(rf"^((?:.*\.)?){re.escape(layout.layers)}\.(\d+)\.{re.escape(layout.query)}$")
    found: dict[str, dict[int, str]] = {}
    for name in shapes:
        match = stem.match(name)
        if match:
            layer = name[: -len(layout.query)]
            if {layer + layout.up, layer + (layout.gate or layout.up)} <= shapes.keys():
                found.setdefault(match[1], {})[int(match[2])] = layer
    return {prefix: [layers[i] for i in sorted(layers)] for prefix, layers in found.items()}


def _block(shapes: Shapes, layout: Layout, layer: str, heads: int, index: int, before: str) -> Block:
    """``before`` is the norm that the attention reads where norms come after the sums."""
    attention = _attention_of(shapes, layout, layer, heads)
    mlp = _mlp_of(shapes, layout, layer)
    _refuse_strangers(shapes, layout, layer)
    norms = _norms_of(shapes, layout, layer, before)
    scales = [layer + name if layer + name in shapes else None for name in layout.scales] or [None, None]
    attention = replace(attention, norm=norms[0], scale=scales[0])
    mlp = replace(mlp, norm=norms[1], scale=scales[1])
    return Block(index, attention, mlp, layer.rstrip("."))


def _norms_of(shapes: Shapes, layout: Layout, layer: str, before: str) -> tuple[Norm | None, Norm | None]:
    """What attention and MLP read; unknown where the block has other norms besides (Gemma 2, norms of outputs)."""
    named = {layer + name for name in layout.norms}
    found = {
        n.rpartition(".")[0] for n in shapes if n.startswith(layer) and re.search(r"norm|\bln_", n, re.I)
    }
    if found != named:
        return None, None
    first, second = (before if layout.first else layer + layout.norms[0]), layer + layout.norms[1]
    return _norm(shapes, first, not layout.first), _norm(shapes, second, not layout.first)


def _norm(shapes: Shapes, name: str, own: bool) -> Norm | None:
    weight, bias = f"{name}.weight", f"{name}.bias"
    return Norm(weight, bias if bias in shapes else None, own) if weight in shapes else None


def _attention_of(shapes: Shapes, layout: Layout, layer: str, heads: int) -> Attention:
    query, key, value = _maps(shapes, [layer + n for n in (layout.query, layout.key, layout.value)])
    output = _maps(shapes, [layer + layout.output])[0]
    width = _rows(shapes, query)
    if heads < 1 or width % heads:
        raise AnatomyError(f"{layer}: {heads} heads do not divide the {width} rows of {query.weight}")
    head_dim = width // heads
    kept = _rows(shapes, key)
    if kept != _rows(shapes, value) or kept % head_dim or width % kept:
        raise AnatomyError(
            f"{layer}: {heads} heads of {head_dim} rows cannot share the {kept} rows of {key.weight} "
            f"and the {_rows(shapes, value)} of {value.weight}"
        )
    if layout.rotary and head_dim % 2:
        raise AnatomyError(f"{layer}: heads of {head_dim} rows cannot be rotated in pairs")
    _expect_columns(shapes, output, width)
    return Attention(query, key, value, output, heads, head_dim, kept // head_dim, layout.rotary)


def _mlp_of(shapes: Shapes, layout: Layout, layer: str) -> Mlp:
    gate: Linear | None = None
    if layout.gate:
        gate, up = _maps(shapes, [layer + layout.gate, layer + layout.up])
    else:
        (up,) = _maps(shapes, [layer + layout.up])
    (down,) = _maps(shapes, [layer + layout.down])
    hidden = _rows(shapes, up)
    if gate is not None and _rows(shapes, gate) != hidden:
        raise AnatomyError(f"{layer}: {gate.weight} and {up.weight} differ in rows")
    _expect_columns(shapes, down, hidden)
    return Mlp(up, down, hidden, gate)


def _maps(shapes: Shapes, weights: list[str]) -> list[Linear]:
    """Linear maps with these weight names; equal names share the tensor's rows evenly, in order."""
    maps: list[Linear] = []
    for position, weight in enumerate(weights):
        shape = shapes.get(weight)
        if shape is None or len(shape) != 2:
            raise AnatomyError(f"looked for a matrix {weight}, found {'nothing' if shape is None else shape}")
        bias = re.sub(r"weight$", "bias", weight)
        if shapes.get(bias, shape[:1]) != shape[:1]:
            turned = " (is it stored transposed, as Conv1D does?)" if shapes[bias] == shape[1:] else ""
            raise AnatomyError(f"{bias} has shape {shapes[bias]}, {weight} has {shape[0]} rows{turned}")
        parts = weights.count(weight)
        if shape[0] % parts:
            raise AnatomyError(f"{weight}: {shape[0]} rows cannot be {parts} packed maps")
        size = shape[0] // parts
        rows = (position * size, (position + 1) * size) if parts > 1 else None
        maps.append(Linear(weight, bias if bias in shapes else None, rows))
    return maps


def _rows(shapes: Shapes, linear: Linear) -> int:
    return linear.rows[1] - linear.rows[0] if linear.rows else shapes[linear.weight][0]


def _expect_columns(shapes: Shapes, linear: Linear, columns: int) -> None:
    if shapes[linear.weight][1] != columns:
        raise AnatomyError(f"{linear.weight} has shape {shapes[linear.weight]}, expected {columns} columns")


def _refuse_strangers(shapes: Shapes, layout: Layout, layer: str) -> None:
    """Tensors in the block's attention and MLP modules that no column of the row accounts for."""
    named = [layout.query, layout.key, layout.value, layout.output, layout.up, layout.down]
    named += [layout.gate] if layout.gate else []
    known = {re.sub(r"weight$", end, name) for name in named for end in ("weight", "bias")}
    known.update(layout.neutral)
    modules = {name.split(".")[0] for name in named}
    for name in shapes:
        if name.startswith(layer):
            rest = name[len(layer) :]
            if rest.split(".")[0] in modules and rest not in known:
                raise AnatomyError(
                    f"{name}: not part of the layout {layout.name!r}, and inside its attention or MLP"
                )


def _nothing_found(shapes: Shapes, heads: int | Mapping[str, int], rotary: bool) -> str:
    looked = "; ".join(
        f"{row.name}{' (rotary)' * row.rotary}: {row.layers}.<i>.{row.query} and {row.up}" for row in LAYOUTS
    )
    asked = "" if isinstance(heads, int) else f" under the prefixes {sorted(heads)}"
    others = [row.name for row in LAYOUTS if row.rotary != rotary and _towers(shapes, row)]
    hint = f". It would be {others[0]!r} with rotary={not rotary}" if others else ""
    sample = ", ".join(list(shapes)[:3]) or "nothing"
    return f"unknown layout{asked}{hint}. Looked for {looked}. The names begin with {sample}"
