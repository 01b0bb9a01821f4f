"""Order statistics of magnitudes: exact whatever the values and the sample, in few looks and little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesec.tensorwise import Span, spans
from mergesec_methods.merging import _ranks

SIZE = 300_001


def values(kind: str, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    drawn = torch.randn(size, generator=generator)
    if kind == "zeros":
        return drawn * (torch.rand(size, generator=generator) < 0.2)
    if kind == "coarse":
        return (2 * drawn).round()
    if kind == "bfloat16":
        return drawn.bfloat16().float()
    if kind == "infinite":
        return torch.where(torch.rand(size, generator=generator) < 0.5, torch.inf, drawn)
    return {"normal": drawn, "constant": torch.full((size,), 0.25), "sorted": drawn.sort().values}[kind]


@pytest.mark.parametrize("size", [1, 500, 9000, SIZE])
@pytest.mark.parametrize(
    "kind", ["normal", "zeros", "coarse", "bfloat16", "constant", "infinite", "sorted"]
)  # fmt: skip
def test_equal_to_sorting_in_at_most_three_passes(kind: str, size: int) -> None:
    vector = values(kind, size)
    ordered = vector.abs().sort().values
    chunks, passes = _ranks.tensor_pieces("w", torch.zeros(size), [vector]), []

    def counted() -> Iterator[Span]:
        passes.append(1)
        return chunks()

    for shares in ((0.0,), (1.0,), (0.8,), (0.15, 0.99), (0.6, 0.999, 0.3)):
        ranks = [max(1, int(share * size)) for share in shares]
        passes.clear()
        found = _ranks.magnitude_ranks(counted, 1, size, [*ranks, 0, size + 1])[0]
        assert found == [*(float(ordered[rank - 1]) for rank in ranks), 0.0, float("inf")]
        assert len(passes) <= 3


@pytest.mark.parametrize("kind", ["normal", "zeros", "bfloat16", "constant"])
def test_what_is_kept_is_little(kind: str) -> None:
    """Values shared by many entries are counted; of the others about the bracket's share is held."""
    vector, held = values(kind, SIZE), [0]

    class Watched(_ranks._Search):
        def settle(self) -> None:
            held[0] = max(held[0], sum(kept.numel() for kept in self.inside))
            super().settle()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ranks, "_Search", Watched)
        for share in (0.1, 0.5, 0.79, 0.8, 0.81, 0.99):
            _ranks.magnitude_ranks(
                _ranks.tensor_pieces("w", torch.zeros(SIZE), [vector]), 1, SIZE, [int(share * SIZE)]
            )
    assert held[0] < 0.05 * SIZE


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2**31), st.integers(1, 200), st.data())
def test_several_vectors_tensors_and_unlucky_samples(
    count: int, seed: int, sample: int, data: st.DataObject
) -> None:
    """Small integers over several tensors; tiny samples whose brackets miss."""
    rng = np.random.default_rng(seed)
    sizes = data.draw(st.lists(st.integers(1, 20_000), min_size=1, max_size=3))
    parts = [
        [torch.from_numpy(rng.integers(-9, 9, n).astype(np.float32)) for n in sizes] for _ in range(count)
    ]
    total = sum(sizes)
    ranks = data.draw(st.lists(st.integers(1, total), min_size=1, max_size=3))

    def chunks() -> Iterator[Span]:
        for i, n in enumerate(sizes):
            yield from spans(f"w{i}", torch.zeros(n), [own[i] for own in parts], 4096)

    found = _ranks.magnitude_ranks(chunks, count, total, ranks, sample=sample)
    for own, result in zip(parts, found, strict=True):
        ordered = torch.cat(own).abs().sort().values
        assert result == [float(ordered[rank - 1]) for rank in ranks]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int, several_threads: Callable[[int], None]) -> None:
    several_threads(threads)
    size = 1 << 20
    vector = values("normal", size)
    ordered = vector.abs().sort().values
    chunks = _ranks.tensor_pieces("w", torch.zeros(size), [vector, 2 * vector])
    found = _ranks.magnitude_ranks(chunks, 2, size, [1000, size // 2])
    assert found == [[float(k * ordered[999]), float(k * ordered[size // 2 - 1])] for k in (1, 2)]


@pytest.fixture
def several_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
