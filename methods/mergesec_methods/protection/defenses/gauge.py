"""Changes of coordinates that no published protection makes: shifts, norms, means. All keep the function.

PaRaMS, MergeLock and ARF change coordinates inside heads and among hidden units. A block has more symmetries
(``mergesec.anatomy.Kind``), and what re-aligns heads and units to the base does not know them:

* ``value_shift``: b_v ← b_v + c per head, b_o ← b_o − W_o c. Exact for any c, since attention weights sum to 1.
* ``key_shift``: b_k ← b_k + c per head. Every score of a query grows by the same, which softmax cancels.
* ``norm_rescale``: γ, β ← D γ, D β of a norm, the columns of the maps that read it divided by D; likewise a
  layer scale and the map before it, and the up rows and down columns of a gated MLP.
* ``mean_shift``: a layer norm takes the mean away, so whatever is written in the direction (1, …, 1) never
  arrives, and whatever reads along 1/γ reads nothing: any multiple of either is added.
* ``denoiser_gauge``: what networks that generate images have besides. Gates and scales of adaptive norms against the
  maps behind and before them, the value half of a GEGLU against the down columns, channels between two convolutions in
  another order with whole groups' signs, and of normed queries and keys signs, one order for all heads, gains, and a
  factor per head. Signs are drawn everywhere.
* ``full_gauge``: all of them, PaRaMS and a random order of heads.

A shift alone hurts a merge little: it is linear in the weights but for the product W_o b_v. Beside PaRaMS it
breaks the fits by which attacks find the matrices again. ``params`` puts PaRaMS beside each: its rearrangement
before, its scaling after. The other way round an error that a shift makes in a head's coordinates would be
multiplied by the condition number of the scaling, up to 10⁵ for ``nonsymmetric``.

The shifts are baselines of this benchmark; as a mark of ownership, not against merging, the rescaling of norms is
in "Functional Invariants to Watermark Large Transformers" (arXiv 2310.11446). Where a network has none of a
card's symmetries the defense refuses and says what it would need: no value shift without biases (Llama), no key
shift under rotary positions (a rotated shift differs between keys), no rescaling of norms that the residual
stream reads too (BERT). Grouped heads share one shift per key and value head.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mergesec.anatomy import UP_TO_EPSILON, Kind, symmetries
from mergesec.contracts import Defense, ProtectContext, Protected, Weights
from mergesec_methods.protection.defenses._gauges import Draw, move
from mergesec_methods.protection.defenses.params import Params

CARDS = [
    {
        "name": "value_shift",
        "kind": "defense",
        "class": "ValueShift",
        "version": "1",
        "title": "Value-bias shift",
        "summary": "baseline: value biases shifted per head, the output bias takes it off again; exact",
        "threat": "protection",
        "hooks": ["protect"],
        "knowledge": "the expert (with params: and the public base); no data, no training",
        "data": "none",
        "modalities": ["image", "text", "generation"],
        "seeded": True,
        "parameters": {
            "size": {
                "type": "float",
                "default": 10.0,
                "min": 0.0,
                "max": 1e4,
                "doc": "standard deviation of a shift, in units of how far what it is added to varies",
            },
            "params": {
                "type": "choice",
                "default": "off",
                "choices": ["off", "none", "v1", "diagonal", "symmetric", "nonsymmetric"],
                "doc": "PaRaMS beside it, with this scaling (none: rearrangement alone)",
            },
        },
    },
    {
        "name": "key_shift",
        "extends": "value_shift",
        "class": "KeyShift",
        "title": "Key-bias shift",
        "summary": "baseline: key biases shifted per head, which softmax cancels; exact",
    },
    {
        "name": "mean_shift",
        "extends": "value_shift",
        "class": "MeanShift",
        "title": "Mean shift",
        "summary": "baseline: what layer norms take away is added to the maps before and behind them; exact",
        "parameters": {
            "size": {
                "type": "float",
                "default": 3.0,
                "min": 0.0,
                "max": 1e4,
                "doc": "standard deviation of a shift, in units of how far what it is added to varies",
            },
        },
    },
    {
        "name": "norm_rescale",
        "kind": "defense",
        "class": "NormRescale",
        "version": "1",
        "title": "Norm rescale",
        "summary": "baseline: norms, layer scales and gated units rescaled, the next maps divided; exact",
        "threat": "protection",
        "hooks": ["protect"],
        "knowledge": "the expert (with params: and the public base); no data, no training",
        "data": "none",
        "modalities": ["image", "text", "generation"],
        "seeded": True,
        "parameters": {
            "span": {
                "type": "float",
                "default": 20.0,
                "min": 1.0,
                "max": 1e6,
                "doc": "factors are log-uniform between 1/span and span",
            },
            "params": {
                "type": "choice",
                "default": "off",
                "choices": ["off", "none", "v1", "diagonal", "symmetric", "nonsymmetric"],
                "doc": "PaRaMS beside it, with this scaling (none: rearrangement alone)",
            },
        },
    },
    {
        "name": "denoiser_gauge",
        "extends": "norm_rescale",
        "class": "DenoiserGauge",
        "title": "Denoiser gauge",
        "summary": "ours: gates and scales of adaptive norms, value halves of GEGLU, channels and signs of groups, "
        "normed queries and keys; exact",
        "modalities": ["generation"],
        "parameters": {
            "epsilon": {
                "type": "bool",
                "default": True,
                "doc": "also factors above 1 of normed queries and keys, exact up to the norm's epsilon",
            },
        },
    },
    {
        "name": "full_gauge",
        "extends": "value_shift",
        "class": "FullGauge",
        "title": "Full gauge",
        "summary": "baseline: every symmetry of the network's blocks at once, PaRaMS included; exact",
        "knowledge": "the expert and the public base; no data, no training",
        "parameters": {
            "size": {
                "type": "float",
                "default": 3.0,
                "min": 0.0,
                "max": 1e4,
                "doc": "standard deviation of a shift, in units of how far what it is added to varies",
            },
            "span": {
                "type": "float",
                "default": 20.0,
                "min": 1.0,
                "max": 1e6,
                "doc": "factors are log-uniform between 1/span and span, with random signs",
            },
            "params": {
                "type": "choice",
                "default": "nonsymmetric",
                "choices": ["off", "none", "v1", "diagonal", "symmetric", "nonsymmetric"],
                "doc": "PaRaMS beside it, with this scaling (none: rearrangement alone)",
            },
        },
    },
]

STREAM = 10
"""Streams of a context's generator below this one are those of PaRaMS."""


class _Gauge(Defense):
    """Random elements of some kinds of symmetries, beside PaRaMS if it is asked for. Keeps keys, shapes, dtypes."""

    kinds: Collection[Kind] = ()

    def __init__(
        self, size: float = 3.0, span: float = 20.0, params: str = "off", signs: bool = False
    ) -> None:
        self.size, self.span, self.signs = size, span, signs
        self.before = None if params == "off" else Params(scaling="none")
        self.after = None if params in ("off", "none") else Params(permute=False, scaling=params)

    def protect(self, weights: Weights, ctx: ProtectContext) -> Protected:
        """The expert in other coordinates. The report has the kinds of symmetries used.

        Raises ContractError if the network has none of them, and for tensors below float32.
        """
        anatomy = ctx.backbone.anatomy()
        draw = Draw(ctx.generator(STREAM), self.size, self.span, self.signs)
        start = weights if self.before is None else self.before.protect(weights, ctx).weights
        moved = move(start, anatomy, self.kinds, draw, self.name)
        ended = Protected(moved) if self.after is None else self.after.protect(moved, ctx)
        used = {s.kind for s in symmetries(anatomy) if s.kind in self.kinds}
        facts: dict[str, Any] = {"condition": 1.0, **ended.report, "symmetries": sorted(used)}
        return Protected(ended.weights, facts)


class ValueShift(_Gauge):
    """The defense of the card ``value_shift``."""

    kinds = (Kind.VALUE_SHIFT,)

    def __init__(self, size: float = 10.0, params: str = "off") -> None:
        super().__init__(size, params=params)


class KeyShift(ValueShift):
    """The defense of the card ``key_shift``."""

    kinds = (Kind.KEY_SHIFT,)


class MeanShift(_Gauge):
    """The defense of the card ``mean_shift``."""

    kinds = (Kind.READER_MEAN, Kind.WRITER_MEAN)


class NormRescale(_Gauge):
    """The defense of the card ``norm_rescale``."""

    kinds = (Kind.NORM_SCALE, Kind.LAYER_SCALE, Kind.UNIT_SCALE)


class DenoiserGauge(_Gauge):
    """The defense of the card ``denoiser_gauge``: symmetries of networks that generate images which no published
    protection uses."""

    exact = (
        Kind.NORM_SCALE,
        Kind.LAYER_SCALE,
        Kind.UNIT_SCALE,
        Kind.CHANNEL_ORDER,
        Kind.GROUP_SIGN,
        Kind.QK_SIGN,
        Kind.QK_ORDER,
        Kind.QK_GAIN,
    )

    def __init__(self, span: float = 20.0, params: str = "off", epsilon: bool = True) -> None:
        super().__init__(span=span, params=params, signs=True)
        self.kinds = (*self.exact, Kind.QK_SCALE) if epsilon else self.exact


class FullGauge(_Gauge):
    """The defense of the card ``full_gauge``: what PaRaMS leaves out of the group."""

    kinds = tuple(
        k for k in Kind if k not in (Kind.HIDDEN_ORDER, Kind.QUERY_KEY, Kind.VALUE_OUTPUT, *UP_TO_EPSILON)
    )

    def __init__(self, size: float = 3.0, span: float = 20.0, params: str = "nonsymmetric") -> None:
        super().__init__(size, span, params, signs=True)
