"""Every listed layout is recognised from names and shapes alone; everything else is refused by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesec.anatomy import LAYOUTS, Anatomy, AnatomyError, Kind, Linear, Norm, describe, symmetries

WIDTH, HIDDEN = 12, 20
SPLIT = {
    "mini ViT": ("blocks.", ("attn.q", "attn.k", "attn.v", "attn.o"), ("mlp.up", "mlp.down")),
    "HF CLIP": (
        "encoder.layers.",
        tuple(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")),
        ("mlp.fc1", "mlp.fc2"),
    ),
    "HF ViT (transformers 5)": (
        "layers.",
        tuple(f"attention.{n}_proj" for n in "qkvo"),
        ("mlp.fc1", "mlp.fc2"),
    ),
    "HF ViT (transformers 4)": (
        "encoder.layer.",
        (*(f"attention.attention.{n}" for n in ("query", "key", "value")), "attention.output.dense"),
        ("intermediate.dense", "output.dense"),
    ),
    "HF DINOv2 (transformers 5)": (
        "encoder.layer.",
        tuple(f"attention.{n}_proj" for n in "qkvo"),
        ("mlp.fc1", "mlp.fc2"),
    ),
    "HF DINOv2 (transformers 4)": (
        "encoder.layer.",
        (*(f"attention.attention.{n}" for n in ("query", "key", "value")), "attention.output.dense"),
        ("mlp.fc1", "mlp.fc2"),
    ),
    "HF DINOv2 SwiGLU (transformers 5)": (
        "encoder.layer.",
        tuple(f"attention.{n}_proj" for n in "qkvo"),
        ("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"),
    ),
    "HF BERT": (
        "encoder.layer.",
        (*(f"attention.self.{n}" for n in ("query", "key", "value")), "attention.output.dense"),
        ("intermediate.dense", "output.dense"),
    ),
    "HF DistilBERT": (
        "transformer.layer.",
        tuple(f"attention.{n}_lin" for n in ("q", "k", "v", "out")),
        ("ffn.lin1", "ffn.lin2"),
    ),
}
NORMS = {"HF BERT": ("attention.output.LayerNorm", "output.LayerNorm"), "HF CLIP": ("layer_norm1",)}


def linear(name: str, rows: int, columns: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}weight": (rows, columns)}
    return {**shapes, f"{name}bias": (rows,)} if bias else shapes


def split_shapes(layout: str, prefix: str = "", depth: int = 2, bias: bool = True) -> dict:
    """A state dict's shapes in one of the unpacked layouts, deepest block first (order must not matter)."""
    stem, attention, mlp = SPLIT[layout]
    shapes: dict[str, tuple[int, ...]] = {"stem.weight": (WIDTH, 3, 4, 4)}
    for i in reversed(range(depth)):
        layer = f"{prefix}{stem}{i}."
        for name in attention:
            shapes |= linear(f"{layer}{name}.", WIDTH, WIDTH, bias)
        for name in mlp:
            rows, columns = (WIDTH, HIDDEN) if name is mlp[1] else (HIDDEN, WIDTH)
            shapes |= linear(f"{layer}{name}.", rows, columns, bias)
        for name in NORMS.get(layout, ("norm1",)):
            shapes |= {f"{layer}{name}.weight": (WIDTH,), f"{layer}{name}.bias": (WIDTH,)}
    return shapes


def packed_shapes(layer: str, qkv: str, output: str, mlp: tuple[str, str]) -> dict:
    shapes = linear(f"{layer}{qkv}", 3 * WIDTH, WIDTH) | linear(f"{layer}{output}.", WIDTH, WIDTH)
    return shapes | linear(f"{layer}{mlp[0]}.", HIDDEN, WIDTH) | linear(f"{layer}{mlp[1]}.", WIDTH, HIDDEN)


def sizes(anatomy: Anatomy) -> set[tuple[int, int, int]]:
    return {(b.attention.heads, b.attention.head_dim, b.mlp.hidden) for b in anatomy.blocks}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "model.", "vision_model."])
@pytest.mark.parametrize("layout", sorted(SPLIT))
def test_unpacked_layouts(layout: str, prefix: str, bias: bool) -> None:
    anatomy = describe(split_shapes(layout, prefix, depth=11, bias=bias), heads=3)
    stem, attention, mlp = SPLIT[layout]
    assert anatomy.layout == layout
    assert [b.name for b in anatomy.blocks] == [f"{prefix}{stem}{i}" for i in range(11)]
    assert [b.index for b in anatomy.blocks] == list(range(11))
    assert sizes(anatomy) == {(3, WIDTH // 3, HIDDEN)}
    block = anatomy.blocks[10]
    layer = f"{prefix}{stem}10."
    maps = (block.attention.query, block.attention.key, block.attention.value, block.attention.output)
    for found, name in zip((*maps, block.mlp.up, block.mlp.down), (*attention, *mlp[:2]), strict=True):
        assert found == Linear(f"{layer}{name}.weight", f"{layer}{name}.bias" if bias else None)
    assert (block.mlp.gate is not None) == (len(mlp) == 3)


@pytest.mark.parametrize("prefix", ["", "visual.", "trunk."])
@pytest.mark.parametrize(
    ("layout", "stem", "qkv", "output", "mlp"),
    [
        ("open_clip", "transformer.resblocks.", "attn.in_proj_", "attn.out_proj", ("mlp.c_fc", "mlp.c_proj")),
        ("timm ViT", "blocks.", "attn.qkv.", "attn.proj", ("mlp.fc1", "mlp.fc2")),
        (
            "HF GPT-2 (maps as nn.Linear)",
            "h.",
            "attn.c_attn.",
            "attn.c_proj",
            ("mlp.c_fc", "mlp.c_proj"),
        ),
    ],
)
def test_packed_layouts(prefix: str, layout: str, stem: str, qkv: str, output: str, mlp: tuple) -> None:
    shapes = packed_shapes(f"{prefix}{stem}0.", qkv, output, mlp)
    anatomy = describe(shapes, heads=2)
    attention = anatomy.blocks[0].attention
    name = f"{prefix}{stem}0.{qkv}"
    for found, start in ((attention.query, 0), (attention.key, WIDTH), (attention.value, 2 * WIDTH)):
        assert found == Linear(f"{name}weight", f"{name}bias", (start, start + WIDTH))
    assert attention.output.rows is None
    assert anatomy.layout == layout
    assert sizes(anatomy) == {(2, WIDTH // 2, HIDDEN)}


def test_packed_gate_comes_before_up() -> None:
    layer = "encoder.layer.0."
    shapes = {
        n: s for n, s in split_shapes("HF DINOv2 (transformers 4)", depth=1).items() if ".mlp." not in n
    }
    shapes |= linear(f"{layer}mlp.weights_in.", 2 * HIDDEN, WIDTH)
    shapes |= linear(f"{layer}mlp.weights_out.", WIDTH, HIDDEN)
    anatomy = describe(shapes, heads=3)
    mlp = anatomy.blocks[0].mlp
    assert anatomy.layout == "HF DINOv2 SwiGLU (transformers 4)"
    assert mlp.gate is not None
    assert (mlp.gate.rows, mlp.up.rows, mlp.down.rows) == ((0, HIDDEN), (HIDDEN, 2 * HIDDEN), None)


def test_two_towers_with_their_own_heads() -> None:
    shapes = split_shapes("HF CLIP", "text_model.") | split_shapes("HF CLIP", "vision_model.")
    assert len(describe(shapes, 2).blocks) == 4
    both = describe(shapes, {"text_model.": 2, "vision_model.": 4})
    assert [(b.name.split(".")[0], b.attention.heads, b.index) for b in both.blocks] == [
        ("text_model", 2, 0),
        ("text_model", 2, 1),
        ("vision_model", 4, 2),
        ("vision_model", 4, 3),
    ]
    assert len(describe(shapes, {"vision_model.": 4}).blocks) == 2
    with pytest.raises(AnatomyError, match="visual"):
        describe(shapes, {"visual.": 4})


def test_every_row_is_covered_here() -> None:
    packed = {"open_clip", "timm ViT", "HF DINOv2 SwiGLU (transformers 4)", "HF GPT-2 (maps as nn.Linear)"}
    rotary = {"HF Llama, Mistral, Qwen2, Gemma"}
    assert {row.name for row in LAYOUTS} == set(SPLIT) | packed | rotary
    assert {row.name for row in LAYOUTS if row.rotary} == rotary
    assert len({row.name for row in LAYOUTS}) == len(LAYOUTS)


def llama_shapes(heads: int, kv_heads: int, head_dim: int = 4, prefix: str = "") -> dict:
    """Llama's names, ``heads`` query heads on ``kv_heads`` key and value heads."""
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (30, WIDTH)}
    for layer in (f"{prefix}layers.{i}." for i in range(2)):
        rows = {"q": heads, "k": kv_heads, "v": kv_heads}
        for name, count in rows.items():
            shapes |= linear(f"{layer}self_attn.{name}_proj.", count * head_dim, WIDTH, bias=False)
        shapes |= linear(f"{layer}self_attn.o_proj.", WIDTH, heads * head_dim, bias=False)
        for name in ("gate", "up"):
            shapes |= linear(f"{layer}mlp.{name}_proj.", HIDDEN, WIDTH, bias=False)
        shapes |= linear(f"{layer}mlp.down_proj.", WIDTH, HIDDEN, bias=False)
        shapes |= {f"{layer}{n}_layernorm.weight": (WIDTH,) for n in ("input", "post_attention")}
    return shapes


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 3, 4), (6, 2, 4), (6, 1, 8)])
def test_rotary_layouts(heads: int, kv_heads: int, head_dim: int, prefix: str) -> None:
    shapes = llama_shapes(heads, kv_heads, head_dim, prefix)
    anatomy = describe(shapes, heads, rotary=True)
    assert [b.name for b in anatomy.blocks] == [f"{prefix}layers.{i}" for i in range(2)]
    for block in anatomy.blocks:
        a = block.attention
        assert (a.heads, a.kv_heads, a.head_dim, a.rotary) == (heads, kv_heads, head_dim, True)
        assert a.group == heads // kv_heads
        assert block.mlp.gate == Linear(f"{block.name}.mlp.gate_proj.weight", None)
        assert block.mlp.up == Linear(f"{block.name}.mlp.up_proj.weight", None)


def test_rotation_has_to_be_said() -> None:
    """No tensor tells whether queries and keys are rotated, so neither is taken for the other."""
    with pytest.raises(AnatomyError, match=r"would be 'HF Llama.*' with rotary=True"):
        describe(llama_shapes(3, 3), 3)
    with pytest.raises(AnatomyError, match="would be 'mini ViT' with rotary=False"):
        describe(split_shapes("mini ViT"), 3, rotary=True)
    assert not any(b.attention.rotary for b in describe(split_shapes("mini ViT"), 3).blocks)


def test_rotary_layouts_are_refused_where_they_would_be_wrong() -> None:
    with pytest.raises(AnatomyError, match="heads of 3 rows cannot be rotated in pairs"):
        describe(llama_shapes(4, 2, head_dim=3), 4, rotary=True)
    with pytest.raises(AnatomyError, match="q_norm"):  # Qwen3, Gemma 3
        describe(llama_shapes(4, 2) | {"layers.0.self_attn.q_norm.weight": (4,)}, 4, rotary=True)
    shapes = llama_shapes(4, 2) | {"layers.0.self_attn.rotary_emb.inv_freq": (2,)}
    assert len(describe(shapes, 4, rotary=True).blocks) == 2
    with pytest.raises(AnatomyError, match="cannot share"):
        describe(llama_shapes(4, 3), 4, rotary=True)


def test_grouped_heads_without_rotation() -> None:
    shapes = split_shapes("mini ViT")
    for i in range(2):
        for name in "kv":
            shapes |= linear(f"blocks.{i}.attn.{name}.", 4, WIDTH)
    assert {(b.attention.kv_heads, b.attention.group) for b in describe(shapes, 3).blocks} == {(1, 3)}


# ------------------------------------------------------------------ refusals


def test_unknown_layout_names_what_was_looked_for() -> None:
    with pytest.raises(AnatomyError) as error:
        describe({"conv1.weight": (8, 3, 3, 3)}, heads=2)
    message = str(error.value)
    assert "conv1.weight" in message
    assert all(row.name in message and row.query in message for row in LAYOUTS)
    assert isinstance(error.value, ValueError)


@given(st.integers(-2, 40))
@settings(max_examples=30, deadline=None)
def test_heads_divide_or_are_refused(heads: int) -> None:
    shapes = split_shapes("mini ViT")
    if heads > 0 and WIDTH % heads == 0:
        assert sizes(describe(shapes, heads)) == {(heads, WIDTH // heads, HIDDEN)}
    else:
        with pytest.raises(AnatomyError, match="heads do not divide the 12 rows"):
            describe(shapes, heads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.attn.k.weight": (6, WIDTH), "blocks.1.attn.k.bias": (6,)}, "cannot share the 6 rows"),
        ({"blocks.0.attn.o.weight": (WIDTH, 6)}, "blocks.0.attn.o.weight has shape .* expected 12 columns"),
        ({"blocks.0.mlp.down.weight": (WIDTH, 7)}, "expected 20 columns"),
        ({"blocks.0.mlp.up.bias": (7,)}, "blocks.0.mlp.up.bias has shape"),
        ({"blocks.0.attn.v.weight": (WIDTH,)}, "looked for a matrix blocks.0.attn.v.weight"),
        ({"blocks.1.attn.o.weight": None}, "looked for a matrix blocks.1.attn.o.weight, found nothing"),
        ({"blocks.0.attn.q_norm.weight": (4,)}, "blocks.0.attn.q_norm.weight: not part of the layout"),
        ({"blocks.1.mlp.norm.weight": (HIDDEN,)}, "blocks.1.mlp.norm.weight: not part of the layout"),
    ],
)
def test_contradictions_are_named(change: dict, message: str) -> None:
    shapes = split_shapes("mini ViT") | change
    with pytest.raises(AnatomyError, match=message):
        describe({n: s for n, s in shapes.items() if s is not None}, heads=3)


def test_relative_positions_are_refused() -> None:
    name = "encoder.layer.0.attention.self.distance_embedding.weight"
    with pytest.raises(AnatomyError, match="distance_embedding"):
        describe(split_shapes("HF BERT") | {name: (31, 4)}, heads=3)


def test_anatomy_is_torch_free() -> None:
    code = "import sys, mergesec.anatomy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------ norms and layer scales


def vectors(*names: str) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, (WIDTH,))


def test_norms_before_the_maps_are_read_by_them_alone() -> None:
    shapes = llama_shapes(4, 2)
    for block in describe(shapes, 4, rotary=True).blocks:
        assert block.attention.norm == Norm(f"{block.name}.input_layernorm.weight", None)
        assert block.mlp.norm == Norm(f"{block.name}.post_attention_layernorm.weight", None)
        assert not block.mlp.norm.centred


def test_norms_after_the_sums_are_those_of_the_block_before() -> None:
    shapes = split_shapes("HF BERT", "bert.") | vectors(
        "bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"
    )
    first, second = describe(shapes, 3).blocks
    names = [block.attention.norm.weight for block in (first, second) if block.attention.norm]
    assert names == ["bert.embeddings.LayerNorm.weight", "bert.encoder.layer.0.output.LayerNorm.weight"]
    assert second.mlp.norm == Norm(
        "bert.encoder.layer.1.attention.output.LayerNorm.weight",
        "bert.encoder.layer.1.attention.output.LayerNorm.bias",
        own=False,
    )


def test_norms_that_are_missing_or_not_alone_are_unknown() -> None:
    """A norm of the output (Gemma 2) would make the names mean something else."""
    shapes = llama_shapes(4, 2) | vectors("layers.1.pre_feedforward_layernorm.weight")
    known = [[part.norm is not None for part in b.parts] for b in describe(shapes, 4, rotary=True).blocks]
    assert known == [[True, True], [False, False]]
    without = {n: s for n, s in split_shapes("mini ViT").items() if "norm" not in n}
    anatomy = describe(without, 3)
    assert all(part.norm is None for block in anatomy.blocks for part in block.parts)
    border = {Kind.NORM_SCALE, Kind.NORM_SHIFT, Kind.READER_MEAN, Kind.WRITER_MEAN, Kind.LAYER_SCALE}
    assert not border & {s.kind for s in symmetries(anatomy)}


def test_layer_scales_where_there_are_any() -> None:
    names = [f"encoder.layer.{i}.layer_scale{j}.lambda1" for i in range(2) for j in (1, 2)]
    plain = split_shapes("HF DINOv2 (transformers 4)")
    scales = [part.scale for block in describe(plain | vectors(*names), 3).blocks for part in block.parts]
    assert scales == names
    assert all(part.scale is None for block in describe(plain, 3).blocks for part in block.parts)
