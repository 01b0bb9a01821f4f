"""What a network is made of, as an anatomy names it: maps, norms, modulations, attentions, MLPs, and blocks of them.

Torch-free: only names and sizes. ``mergesec.anatomy`` fills these in and hands all of them on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]


class AnatomyError(ValueError):
    """No listed layout fits, or its sizes contradict each other (the message names which)."""


@dataclass(frozen=True)
class Linear:
    """A linear map inside a state dict: rows ``[start, stop)`` of ``weight`` (out × in) and of ``bias``.

    ``rows`` is None for an unpacked map; packed QKV names one tensor three times with three ranges. A convolution
    over single pixels is one, too.
    """

    weight: str
    bias: str | None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Norm:
    """The norm whose output maps read: ``weight ⊙ x̂ + bias``.

    ``own`` says that nothing else reads it. Where the norm comes after the sum the residual stream does too.
    ``grouped`` is a group norm, whose x̂ has mean 0 over a group of channels and all places, not at a place.
    """

    weight: str
    bias: str | None
    own: bool = True
    grouped: bool = False

    @property
    def centred(self) -> bool:
        """Whether x̂ has mean 0. A norm without a bias is taken for an RMS norm, whose x̂ has not."""
        return self.bias is not None and not self.grouped


# --------------------------------------------------------------------------- adaptive norms


@dataclass(frozen=True)
class Modulation:
    """A vector that follows from the condition (time, class, text): rows of a linear map of its embedding, plus row
    ``row`` of a table of the block's own where all blocks share the map (adaLN-single)."""

    linear: Linear
    table: str | None = None
    row: int = 0


@dataclass(frozen=True)
class Adaptive:
    """An adaptive norm and gate: ``(1 + scale(c)) ⊙ x̂ + shift(c)`` is read, ``gate(c) ⊙`` what is written joins the
    stream. x̂ has no weights of its own."""

    scale: Modulation
    shift: Modulation
    gate: Modulation | None = None


@dataclass(frozen=True)
class HeadNorm:
    """RMS norms of queries and keys inside each head: ``weight ⊙ q / rms(q)``, the weight shared by all heads."""

    query: str
    key: str


# --------------------------------------------------------------------------- attention, MLP


@dataclass(frozen=True)
class Side:
    """The second stream of a joint attention (the text of an MMDiT): its own maps, one softmax with the first.

    ``output`` is None where nothing reads the stream any more.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear | None
    norm: Norm | None = None
    scale: str | None = None
    adaptive: Adaptive | None = None
    head_norm: HeadNorm | None = None

    @property
    def maps(self) -> tuple[Linear, ...]:
        """Query, key, value, and output if there is one."""
        return self.readers if self.output is None else (*self.readers, self.output)

    @property
    def readers(self) -> tuple[Linear, ...]:
        """The maps that read the norm."""
        return self.query, self.key, self.value

    @property
    def writer(self) -> Linear | None:
        """The map that writes to the stream."""
        return self.output


@dataclass(frozen=True)
class Attention:
    """One attention layer.

    Head h owns rows ``h·head_dim … (h+1)·head_dim`` of q and those columns of o, and of k, v if there are as
    many of them; else query head h uses key and value head ``h // (heads // kv_heads)``.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    heads: int
    head_dim: int
    kv_heads: int = 0
    """Key and value heads; 0 becomes ``heads``."""
    rotary: bool = False
    """Whether queries and keys are rotated by position, in pairs (i, i + head_dim/2) over the whole head."""
    norm: Norm | None = None
    """What query, key and value read."""
    scale: str | None = None
    """The layer scale: a vector that the output is multiplied by, entry by entry, before it joins the stream."""
    adaptive: Adaptive | None = None
    """In place of ``norm`` and ``scale``, where both follow from a condition."""
    head_norm: HeadNorm | None = None
    """Norms of queries and keys: the group on them is then ``Kind.QK_SIGN`` and its neighbours."""
    cross: bool = False
    """Whether keys and values read another input than queries do (a text that is not in the stream)."""
    joint: Side | None = None
    """Another stream with maps of its own, whose tokens are queries and keys of the same softmax."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)

    @property
    def group(self) -> int:
        """Query heads per key and value head."""
        return self.heads // self.kv_heads

    @property
    def sides(self) -> tuple[Attention | Side, ...]:
        """This attention, and its other stream if it has one: whatever acts on heads acts on both."""
        return (self,) if self.joint is None else (self, self.joint)

    @property
    def maps(self) -> tuple[Linear, ...]:
        """Query, key, value, output; then those of the other stream."""
        own = self.query, self.key, self.value, self.output
        return own if self.joint is None else (*own, *self.joint.maps)

    @property
    def readers(self) -> tuple[Linear, ...]:
        """The maps that read the norm."""
        return (self.query,) if self.cross else (self.query, self.key, self.value)

    @property
    def writer(self) -> Linear:
        """The map that writes to the residual stream."""
        return self.output


@dataclass(frozen=True)
class Mlp:
    """``down(φ(up(x)))``, or ``down(φ(gate(x)) ⊙ up(x))`` where there is a gate.

    Hidden units are rows of ``up`` (and ``gate``) and columns of ``down``.
    """

    up: Linear
    down: Linear
    hidden: int
    gate: Linear | None = None
    norm: Norm | None = None
    """What up (and gate) read."""
    scale: str | None = None
    """The layer scale, as in ``Attention``."""
    adaptive: Adaptive | None = None
    """In place of ``norm`` and ``scale``, as in ``Attention``."""

    @property
    def maps(self) -> tuple[Linear, ...]:
        """Up, gate if there is one, down."""
        return (*self.readers, self.down)

    @property
    def readers(self) -> tuple[Linear, ...]:
        """The maps that read the norm."""
        return (self.up,) if self.gate is None else (self.up, self.gate)

    @property
    def writer(self) -> Linear:
        """The map that writes to the residual stream."""
        return self.down


@dataclass(frozen=True)
class Projection:
    """Maps outside of attention and MLPs that read a norm: what enters a transformer inside of a UNet, what leaves a
    diffusion transformer."""

    readers: tuple[Linear, ...]
    norm: Norm | None = None
    adaptive: Adaptive | None = None
    scale: str | None = None
    writer: Linear | None = None


# --------------------------------------------------------------------------- coordinates, sums


@dataclass(frozen=True)
class Axis:
    """Entries ``start … start + size`` of a tensor along a dimension, one for each coordinate.

    ``signed``: they change sign with their group (``Kind.GROUP_SIGN``), ``scaled``: they are scaled with it
    (``Kind.GROUP_SCALE``). ``telling``: they are what a coordinate is recognised by, since nothing else that may have
    been changed runs through them.
    """

    tensor: str
    dim: int = 0
    start: int = 0
    signed: bool = False
    scaled: bool = False
    telling: bool = False


@dataclass(frozen=True)
class Coordinates:
    """Coordinates of a vector inside the network that may stand in another order, in everything that holds them.

    With ``groups`` (those of a group norm) whole groups may be moved, and coordinates inside of each.
    """

    name: str
    size: int
    axes: tuple[Axis, ...]
    groups: int = 1

    @property
    def signed(self) -> bool:
        """Whether a group may change its sign."""
        return any(axis.signed for axis in self.axes)


@dataclass(frozen=True)
class Terms:
    """A sum whose terms each have a constant: ``first`` (``[size]``) and every row of each of ``others``."""

    first: str
    others: tuple[str, ...]


Part = Attention | Mlp | Side | Projection
"""What reads a norm, and may write to the stream."""


# --------------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class Block:
    """One transformer block; ``index`` counts over the whole anatomy, ``name`` is its prefix of names.

    ``more`` are its other attentions (cross-attention, a second self-attention) and MLPs (of the text stream).
    """

    index: int
    attention: Attention
    mlp: Mlp
    name: str = ""
    more: tuple[Attention | Mlp, ...] = ()

    @property
    def maps(self) -> tuple[Linear, ...]:
        """The attention's maps, then the MLP's, then all others."""
        return tuple(linear for part in self.parts for linear in part.maps)

    @property
    def parts(self) -> tuple[Attention | Mlp, ...]:
        """The attention and the MLP, then all others."""
        return self.attention, self.mlp, *self.more

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """All attentions of the block."""
        return tuple(part for part in self.parts if isinstance(part, Attention))

    @property
    def mlps(self) -> tuple[Mlp, ...]:
        """All MLPs of the block."""
        return tuple(part for part in self.parts if isinstance(part, Mlp))


@dataclass(frozen=True)
class Anatomy:
    """The blocks of a network, in order from the input (tower after tower where there are several).

    ``outside`` is what has symmetries outside of the blocks: embeddings of the condition, convolutions, projections;
    in the order in which they can be told from each other. ``raw`` says that something reads the stream without a
    norm.
    """

    blocks: tuple[Block, ...]
    layout: str = ""
    outside: tuple[Coordinates | Terms | Projection, ...] = ()
    raw: bool = False

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the tensors that hold the blocks' maps, in order, each once."""
        return tuple(dict.fromkeys(linear.weight for block in self.blocks for linear in block.maps))
