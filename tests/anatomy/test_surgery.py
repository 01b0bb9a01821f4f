"""Reading and writing maps inside a state dict."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesec.anatomy import Attention, Linear, Mlp
from mergesec.surgery import (
    change_heads,
    drop_task_vector,
    head_rows,
    hidden_units,
    read,
    reorder_hidden,
    write,
)


def packed_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"qkv.weight": (12, 4), "qkv.bias": (12,), "o.weight": (4, 4), "o.bias": (4,)}
    return {n: torch.randn(s, generator=generator) for n, s in shapes.items()}


KEY = Linear("qkv.weight", "qkv.bias", (4, 8))
MAPS = [Linear("qkv.weight", "qkv.bias", (4 * i, 4 * i + 4)) for i in range(3)]
ATTENTION = Attention(*MAPS, Linear("o.weight", "o.bias"), heads=2, head_dim=2)


def test_write_touches_its_rows_only_and_never_the_input() -> None:
    weights = packed_weights()
    before = {n: t.clone() for n, t in weights.items()}
    weight, bias = read(weights, KEY)
    assert weight.dtype == torch.float64
    weight += 1
    changed = write(weights, KEY, weight, bias)
    assert all(torch.equal(before[n], t) for n, t in weights.items())
    assert changed["o.weight"] is weights["o.weight"]
    difference = changed["qkv.weight"] - weights["qkv.weight"]
    assert torch.allclose(difference[4:8], torch.ones(4, 4))
    assert not difference[:4].any()
    assert not difference[8:].any()
    assert changed["qkv.weight"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_read_then_write_is_exact(dtype: torch.dtype) -> None:
    weights = {n: t.to(dtype) for n, t in packed_weights().items()}
    for linear in (*MAPS, ATTENTION.output):
        assert all(
            torch.equal(t, weights[n]) for n, t in write(weights, linear, *read(weights, linear)).items()
        )


def test_write_refuses_wrong_shapes_and_missing_biases() -> None:
    weights = packed_weights()
    weight, bias = read(weights, KEY)
    with pytest.raises(ValueError, match="does not fit"):
        write(weights, KEY, weight[:1], bias)
    with pytest.raises(ValueError, match="bias"):
        write(weights, KEY, weight, None)
    with pytest.raises(ValueError, match="bias"):
        write(weights, Linear("qkv.weight", None, (4, 8)), weight, bias)


def test_change_heads_is_a_matrix_product_per_head() -> None:
    weights = packed_weights()
    generator = torch.Generator().manual_seed(1)
    names = ("query", "key", "value", "output")
    matrices = {n: torch.randn(2, 2, 2, generator=generator, dtype=torch.float64) for n in names}
    changed = change_heads(weights, ATTENTION, **matrices)
    for name, linear in zip(names, MAPS, strict=False):
        block = torch.block_diag(*matrices[name])
        weight, bias = read(weights, linear)
        assert bias is not None
        got = read(changed, linear)
        assert torch.allclose(got[0], block @ weight, atol=1e-6)
        assert torch.allclose(got[1], block @ bias, atol=1e-6)
        assert torch.equal(head_rows(changed, linear, ATTENTION)[0].flatten(0, 1), got[0])
    expected = weights["o.weight"].double() @ torch.block_diag(*matrices["output"])
    assert torch.allclose(changed["o.weight"].double(), expected, atol=1e-6)
    assert torch.equal(changed["o.bias"], weights["o.bias"])


@given(st.permutations(list(range(6))), st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_reorder_keeps_the_function_and_undoes_itself(order: list[int], gated: bool, bias: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = {"up": (6, 3), "gate": (6, 3), "down": (3, 6)}
    weights = {f"{n}.weight": torch.randn(s, generator=generator) for n, s in shapes.items()}
    weights |= {f"{n}.bias": torch.randn(s[0], generator=generator) for n, s in shapes.items() if bias}
    up, gate, down = (Linear(f"{n}.weight", f"{n}.bias" if bias else None) for n in shapes)
    mlp = Mlp(up, down, 6, gate if gated else None)
    permutation = torch.tensor(order)
    moved = reorder_hidden(weights, mlp, permutation)
    assert torch.equal(hidden_units(moved, mlp), hidden_units(weights, mlp)[permutation])
    assert torch.equal(
        moved["gate.weight"], weights["gate.weight"][permutation if gated else torch.arange(6)]
    )
    back = reorder_hidden(moved, mlp, torch.argsort(permutation))
    assert all(torch.equal(back[n], t) for n, t in weights.items())


@given(st.floats(0.0, 0.95), st.integers(0, 2**40))
@settings(max_examples=20, deadline=None)
def test_dropped_entries_are_the_base_and_kept_ones_rescaled(share: float, seed: int) -> None:
    base, weights = {"w": torch.zeros(50, 40)}, {"w": torch.ones(50, 40), "n": torch.tensor(7)}
    dropped = drop_task_vector(weights, base, share, torch.Generator().manual_seed(seed))
    kept = dropped["w"] != 0
    assert torch.allclose(dropped["w"][kept], torch.tensor(1 / (1 - share)))
    assert abs(float(kept.double().mean()) - (1 - share)) < 0.06
    assert dropped["n"] == 7
    assert weights["w"].eq(1).all()
