"""Arithmetic on named tensors: layouts, task vectors, digests, checks."""

from __future__ import annotations

import hashlib

import pytest
import torch

from mergesec.contracts import ContractError
from mergesec.weights import (
    add_task_vector,
    apply_flat,
    check_finite,
    check_same_layout,
    digest_tensor,
    digest_weights,
    flat_layout,
    flatten,
    read_only,
    task_vector,
    zeros_flat,
)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "b.weight": torch.randn(3, 4, generator=generator),
        "a.bias": torch.randn(5, generator=generator),
        "scalar": torch.tensor(2.5),
        "steps": torch.arange(4),
        "empty": torch.zeros(0, 3),
    }


def test_read_only_refuses_writes_and_ignores_later_edits() -> None:
    source = tensors()
    view = read_only(source)
    source["new"] = torch.zeros(1)
    assert "new" not in view
    with pytest.raises(TypeError):
        view["a.bias"] = torch.zeros(5)  # type: ignore[index]


def test_task_vector_is_the_float_difference() -> None:
    base = tensors()
    expert = {n: t + 1 for n, t in base.items()}
    vector = task_vector(base, expert)
    assert "steps" not in vector
    for name, delta in vector.items():
        assert delta.dtype == torch.float32
        torch.testing.assert_close(delta, torch.ones_like(base[name]))


def test_flat_view_is_sorted_by_name_and_round_trips() -> None:
    base = tensors()
    layout = flat_layout(base)
    assert layout.size == 12 + 5 + 1
    assert list(layout.spans) == ["a.bias", "b.weight", "empty", "scalar"]
    flat = flatten(layout, base)
    torch.testing.assert_close(
        flat, torch.cat([base["a.bias"], base["b.weight"].flatten(), base["scalar"][None]])
    )
    back = apply_flat(layout, {n: torch.zeros_like(t) for n, t in base.items()}, flat)
    for name in layout.spans:
        assert torch.equal(back[name], base[name])


def test_layout_does_not_depend_on_the_order_of_the_mapping() -> None:
    base = tensors()
    assert dict(flat_layout(base).spans) == dict(flat_layout(dict(reversed(base.items()))).spans)


def test_apply_flat_keeps_type_integers_and_inputs() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        base = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors().items()}
        before = {n: t.clone() for n, t in base.items()}
        layout = flat_layout(base)
        moved = apply_flat(layout, base, torch.ones(layout.size), 0.5)
        for name, tensor in base.items():
            assert torch.equal(tensor, before[name])
            assert moved[name].dtype == tensor.dtype
            assert moved[name].shape == tensor.shape
            wanted = (before[name].float() + 0.5).to(dtype) if name != "steps" else tensor
            assert torch.equal(moved[name], wanted)


def test_half_precision_sums_run_in_float32() -> None:
    """A step of 1 and 64 of 2⁻¹²: added up in float16, the small ones would all be lost."""
    base = {"w": torch.zeros(4, dtype=torch.float16)}
    steps = [1.0] + [2.0**-12] * 64
    layout = flat_layout(base)
    total = zeros_flat(layout, base)
    for step in steps:
        add_task_vector(total, layout, base, {"w": torch.full((4,), step, dtype=torch.float16)})
    assert torch.equal(total, torch.full((4,), 1.0 + 2.0**-6))


def test_tied_tensors_are_counted_once_and_stay_tied() -> None:
    shared = torch.arange(6.0).view(2, 3)
    base = {"head": shared, "embedding": shared, "other": torch.zeros(2)}
    layout = flat_layout(base)
    assert layout.size == 8
    assert dict(layout.tied) == {"head": "embedding"}
    moved = apply_flat(layout, base, torch.ones(8))
    assert moved["head"] is moved["embedding"]
    assert torch.equal(moved["head"], shared + 1)
    untied = {"head": shared + 1, "embedding": shared, "other": torch.zeros(2)}
    with pytest.raises(ContractError, match="tied"):
        flatten(layout, untied)


def test_views_of_one_buffer_are_not_tied() -> None:
    packed = torch.arange(12.0)
    base = {"q": packed[:6], "k": packed[6:], "qt": packed[:6].view(2, 3)}
    assert dict(flat_layout(base).tied) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("a.bias"), "'a.bias'.*missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "'extra' is not in the base"),
        (lambda w: w.update({"b.weight": torch.zeros(4, 3)}), r"'b.weight'.*\[4, 3\].*\[3, 4\]"),
        (lambda w: w.update({"a.bias": torch.zeros(5, dtype=torch.int64)}), "'a.bias' is torch.int64"),
    ],
)
def test_layout_check_names_the_tensor(change, message) -> None:  # type: ignore[no-untyped-def]
    broken = tensors()
    change(broken)
    with pytest.raises(ContractError, match=message):
        check_same_layout(tensors(), broken)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite_check_names_the_tensor(bad: float) -> None:
    weights = tensors()
    check_finite(weights)
    weights["b.weight"][1, 2] = bad
    with pytest.raises(ContractError, match=r"'b.weight' holds 1 non-finite"):
        check_finite(weights)


def test_digest_is_over_name_type_shape_and_bytes_only() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    reference = digest_tensor("w", tensor)
    wanted = hashlib.sha256(b"1:w;float32;[2,3];" + tensor.numpy().tobytes()).hexdigest()
    assert reference == wanted
    assert digest_tensor("w", tensor.T.contiguous().T) == reference
    different = [
        digest_tensor("v", tensor),
        digest_tensor("w", tensor.view(3, 2)),
        digest_tensor("w", tensor.double()),
        digest_tensor("w", tensor.view(torch.int32)),
        digest_tensor("w", tensor + 1e-6),
    ]
    assert len({reference, *different}) == 6
    for dtype in (torch.bfloat16, torch.float16, torch.bool):
        assert len(digest_tensor("w", tensor.to(dtype))) == 64
    assert len(digest_tensor("w", torch.tensor(1.0))) == len(digest_tensor("w", torch.zeros(0))) == 64


def test_digest_of_weights_ignores_order_and_sees_every_tensor() -> None:
    weights = tensors()
    reference = digest_weights(weights)
    assert digest_weights(dict(reversed(weights.items()))) == reference
    for name in ("b.weight", "steps", "scalar"):
        changed = {**weights, name: weights[name] + 1}
        assert digest_weights(changed) != reference
