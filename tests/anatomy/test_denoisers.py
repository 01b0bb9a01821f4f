"""The anatomy of UNets, DiT and MMDiT, and the whole group of their symmetries, drawn in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from denoising import GROUPS, HEADS, NAMES, Denoiser, ExactRms, make

from mergesec.anatomy import (
    UP_TO_EPSILON,
    AnatomyError,
    Attention,
    Coordinates,
    Kind,
    Mlp,
    describe,
    describe_denoiser,
    symmetries,
)
from mergesec.surgery import change_heads, reorder_coordinates
from mergesec_methods.protection.defenses._gauges import Draw, move
from mergesec_tasks.diffusion._network import HEADS as SINGLE_HEADS
from mergesec_tasks.diffusion._network import WIDTH

HEAD = {
    Kind.HEAD_ORDER,
    Kind.VALUE_OUTPUT,
    Kind.HIDDEN_ORDER,
    Kind.NORM_SCALE,
    Kind.NORM_SHIFT,
    Kind.CHANNEL_ORDER,
}
CONVOLUTIONS = {Kind.GROUP_SIGN, Kind.GROUP_SCALE, Kind.UNIT_SCALE, Kind.READER_MEAN, Kind.QUERY_KEY}
ADAPTIVE = {Kind.LAYER_SCALE, Kind.VALUE_SHIFT, Kind.TERM_SHIFT}
NORMED = {Kind.QK_SIGN, Kind.QK_ORDER, Kind.QK_GAIN, Kind.QK_SCALE}
GROUP = {
    "unet": HEAD | CONVOLUTIONS,
    "unet_linear": HEAD | CONVOLUTIONS,
    "dit": HEAD | ADAPTIVE | {Kind.QUERY_KEY, Kind.KEY_SHIFT},
    "mmdit": HEAD | ADAPTIVE | {Kind.QUERY_KEY, Kind.KEY_SHIFT},
    "mmdit_normed": HEAD | ADAPTIVE | NORMED,
    "single": HEAD | ADAPTIVE | {Kind.QUERY_KEY, Kind.KEY_SHIFT},
}
PAIRS = [
    (name, kind) for name in ("unet", "dit", "mmdit_normed", "single") for kind in Kind if kind in GROUP[name]
]
PAIRS += [("mmdit", Kind.QUERY_KEY), ("mmdit", Kind.KEY_SHIFT), ("unet_linear", Kind.CHANNEL_ORDER)]
DEAD = ("transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.norm_added_q")
"""The last block of an MMDiT asks for queries of the text and drops what they find."""


def doubled(weights: dict) -> dict:
    return {n: t.double() for n, t in weights.items()}


def draw(seed: int = 0) -> Draw:
    return Draw(torch.Generator().manual_seed(seed), 1.0, 4.0, signs=True)


def gap(network: Denoiser, one: dict, other: dict) -> float:
    first, second = (network.logits(w, torch.float64) for w in (one, other))
    return float((first - second).abs().max() / second.abs().max())


def free_key_biases(network: Denoiser) -> set[str | None]:
    """Biases that softmax cancels, so that they may be anything (KEY_SHIFT)."""
    parts = [a for block in network.anatomy().blocks for a in block.attentions]
    return {a.key.bias for a in parts if a.joint is None and a.head_norm is None}


@contextmanager
def without_epsilon(network: Denoiser) -> Iterator[None]:
    """Group norms and norms of queries and keys with ε = 0."""
    norms = [m for m in network.network.modules() if isinstance(m, torch.nn.GroupNorm | ExactRms)]
    before = [norm.eps for norm in norms]
    for norm in norms:
        norm.eps = 0.0
    yield
    for norm, eps in zip(norms, before, strict=True):
        norm.eps = eps


# ------------------------------------------------------------------ what is named


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_part_is_found(name: str) -> None:
    network = make(name)
    anatomy = network.anatomy()
    assert {s.kind for s in symmetries(anatomy)} == GROUP[name]
    for block in anatomy.blocks:
        assert all(a.heads == (SINGLE_HEADS if name == "single" else HEADS) for a in block.attentions)
        if name.startswith("unet"):
            assert [a.cross for a in block.attentions] == [False, True]
            keys = block.attentions[1].key.weight
            assert network.base[keys].shape[1] == 12  # the text's width
            assert block.mlp.up.rows == (0, block.mlp.hidden)
            assert block.mlp.gate and block.mlp.gate.rows == (block.mlp.hidden, 2 * block.mlp.hidden)
    channels = [p for p in anatomy.outside if isinstance(p, Coordinates) and p.signed]
    assert len(channels) == (8 if name.startswith("unet") else 0)
    assert all(p.groups == GROUPS for p in channels)
    assert len(anatomy.matrices) == len(set(anatomy.matrices))


def test_an_mmdits_blocks_have_two_streams_and_the_last_one_drops_the_text() -> None:
    first, last = make("mmdit_normed").anatomy().blocks
    assert [type(part) for part in first.parts] == [Attention, Mlp, Attention, Mlp]
    assert [type(part) for part in last.parts] == [Attention, Mlp]
    assert first.attention.joint and first.attention.joint.output and first.attention.joint.adaptive
    assert last.attention.joint and last.attention.joint.output is None
    assert first.attention.head_norm and first.more[0].head_norm  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "told"),
    [
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.norm_q.bias", (8,), "not part of any block"),
        ("unet", "class_embedding.weight", (10, 64), "embeddings of classes"),
        ("unet", "down_blocks.0.resnets.0.norm2.weight", (12,), "do not divide"),
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight", (30, 12), "has 30 rows, expected 32"),
        ("unet", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight", (200, 32), "twice as many"),
        ("dit", "transformer_blocks.1.norm1.linear.weight", (95, 16), "should be 6 vectors"),
        ("dit", "transformer_blocks.0.attn1.to_out.0.weight", (16, 15), "has 15 columns"),
        ("mmdit_normed", "transformer_blocks.0.attn.norm_q.bias", (8,), "two RMS norms"),
        ("mmdit", "transformer_blocks.0.adapter.weight", (8, 8), "not part of any block"),
    ],
)  # fmt: skip
def test_what_breaks_a_symmetry_is_refused_by_name(name: str, tensor: str, shape: tuple, told: str) -> None:
    shapes = {n: tuple(t.shape) for n, t in make(name).base.items()} | {tensor: shape}
    with pytest.raises(AnatomyError, match=told):
        describe_denoiser(shapes, HEADS, GROUPS)


def test_a_table_that_does_not_fit_the_shared_map_is_refused_by_name() -> None:
    shapes = {n: tuple(t.shape) for n, t in make("single").base.items()} | {"blocks.2.modulation": (6, 12)}
    with pytest.raises(
        AnatomyError, match=rf"blocks\.2\.modulation has shape \(6, 12\), expected \(6, {WIDTH}\)"
    ):
        describe(shapes, SINGLE_HEADS)


def test_heads_are_asked_for_by_attention() -> None:
    shapes = {n: tuple(t.shape) for n, t in make("dit").base.items()}
    given = {f"transformer_blocks.{i}.attn1": 4 for i in range(2)}
    assert [b.attention.head_dim for b in describe_denoiser(shapes, given).blocks] == [4, 4]
    with pytest.raises(AnatomyError, match=r"transformer_blocks\.1\.attn1: no number of heads"):
        describe_denoiser(shapes, {"transformer_blocks.0.attn1": 4})
    with pytest.raises(AnatomyError, match="3 heads do not divide"):
        describe_denoiser(shapes, 3)
    with pytest.raises(AnatomyError, match=r"unknown denoiser.*begin with a, b"):
        describe_denoiser({"a": (1,), "b": (2,)}, 1)


# ------------------------------------------------------------------ the group


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_every_generator_keeps_the_function_and_needs_every_tensor(name: str, kind: Kind) -> None:
    """The same function to the rounding of float64; with any one tensor left as it was another one."""
    network = make(name)
    expert = doubled(network.expert)
    with without_epsilon(network) if kind in UP_TO_EPSILON else _nothing():
        published = move(expert, network.anatomy(), [kind], draw(), "test")
        assert gap(network, published, expert) < 1e-9
        moved = [n for n, t in published.items() if not torch.equal(t, expert[n])]
        assert moved
        counted = [n for n in moved if n not in free_key_biases(network) and not n.startswith(DEAD)]
        for left in counted[:: max(1, len(counted) // 5)]:
            assert gap(network, {**published, left: expert[left]}, expert) > 1e-6, left


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(2))
def test_random_elements_of_the_whole_group_keep_the_function(name: str, seed: int) -> None:
    network, generator = make(name), torch.Generator().manual_seed(seed)
    kinds = [kind for kind in Kind if kind in GROUP[name]]
    order = [kinds[i] for i in torch.randperm(len(kinds), generator=generator).tolist()]
    expert = doubled(network.expert)
    published = dict(expert)
    with without_epsilon(network):
        for kind in order:
            published = move(
                published, network.anatomy(), [kind], Draw(generator, 1.0, 4.0, signs=True), "test"
            )
        assert gap(network, published, expert) < 1e-9
    moved = sum(float((published[n] - t).square().sum()) for n, t in expert.items())
    assert moved > sum(float(t.square().sum()) for t in expert.values())


@pytest.mark.parametrize("name", ["unet", "mmdit_normed"])
def test_factors_above_one_cost_no_more_than_the_epsilon_of_a_norm(name: str) -> None:
    network, expert = make(name), doubled(make(name).expert)
    kinds = UP_TO_EPSILON & GROUP[name]
    published = move(
        expert, network.anatomy(), kinds, Draw(torch.Generator().manual_seed(1), 1.0, 20.0), "test"
    )
    assert 0 < gap(network, published, expert) < 1e-3


def test_a_matrix_on_normed_queries_and_keys_would_change_the_function() -> None:
    """What commutes with the norm does not; so only that is listed."""
    network, expert = make("mmdit_normed"), doubled(make("mmdit_normed").expert)
    attention = network.anatomy().blocks[0].attention
    eye = torch.eye(attention.head_dim, dtype=torch.float64).expand(attention.heads, -1, -1)
    matrix = draw().matrices(attention.heads, attention.head_dim)
    changed = change_heads(
        expert, attention, query=matrix, key=torch.linalg.inv(matrix).mT, value=eye, output=eye
    )
    assert gap(network, changed, expert) > 1e-3
    signs = eye * draw().coins(attention.heads, attention.head_dim)[:, None]
    kept = change_heads(expert, attention, query=signs, key=signs, value=eye, output=eye)
    assert gap(network, kept, expert) < 1e-9


def test_an_order_across_groups_would_change_the_function() -> None:
    network, expert = make("unet"), doubled(make("unet").expert)
    channels = next(p for p in network.anatomy().outside if isinstance(p, Coordinates) and p.signed)
    order = torch.randperm(channels.size, generator=torch.Generator().manual_seed(0))
    assert gap(network, reorder_coordinates(expert, channels, order), expert) > 1e-3
