"""Merges that weigh generators by statistics of data: what they are computed on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergesec.conformance.battery import MICRO_GENERATION
from mergesec.contracts import DataContext, Expert, MergeContext, Model, Split, TaskView, load_network
from mergesec.generation import EARLY, GenerationTask, Noised, Request, Rows
from mergesec.planning.catalog import load_catalog
from mergesec_methods.merging._fishers import diagonal_fisher
from mergesec_methods.merging._samples import Sample
from mergesec_methods.merging.regmean import RegMean

CPU = torch.device("cpu")
CORNERS = "micro/corners"


def _rows(task: GenerationTask, count: int, seeds: Tensor) -> Split:
    rows = Rows(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), torch.tensor([[1, -1]] * count), seeds)
    return task.batch(Split(rows, torch.zeros(count, dtype=torch.int64)), torch.arange(count), CPU)


@pytest.fixture(scope="module")
def corners() -> GenerationTask:
    task: GenerationTask = load_catalog([MICRO_GENERATION]).get("task", CORNERS).create({})
    return task


def test_fixed_noise_and_times_belong_to_the_row_and_follow_the_law_of_training(
    corners: GenerationTask,
) -> None:
    count = 3000
    batch = _rows(corners, count, torch.arange(count))
    fixed: Noised = corners.fixed(batch).inputs
    assert torch.equal(fixed.noise, batch.inputs.noise)
    alone: Noised = corners.fixed(_rows(corners, 1, torch.tensor([7]))).inputs
    torch.testing.assert_close(alone.times, fixed.times[7:8])
    normal = fixed.times.logit() + EARLY
    assert abs(float(normal.mean())) < 5 / count**0.5
    assert abs(float(normal.var()) - 1) < 5 * (2 / count) ** 0.5
    assert not bool(fixed.dropped.any())


class _Residual(nn.Module):
    """A residual linear in its parameters: r = A θ, so that the Fisher information of θ_k is Σ_j A_jk²."""

    def __init__(self, columns: Tensor) -> None:
        super().__init__()
        self.register_buffer("columns", columns)
        self.theta = nn.Parameter(torch.zeros(columns.shape[1]))


class _Backbone:
    def features(self, network: Any, inputs: Request) -> Tensor:
        residual: Tensor = network.columns @ network.theta
        return residual.expand(len(inputs), -1)


def test_random_signs_give_the_fisher_information_of_a_residual(corners: GenerationTask) -> None:
    count, d = 1500, 40
    columns = torch.randn(d, 3, generator=torch.Generator().manual_seed(2)) * torch.tensor([0.1, 1.0, 3.0])
    batch = _rows(corners, count, torch.arange(count)).inputs
    rows = Rows(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), batch.conditions, torch.arange(count))
    split = Split(rows, torch.zeros(count, dtype=torch.int64))
    ctx = MergeContext(CPU, 0, _Backbone(), {CORNERS: TaskView(corners, {}, split)}, lambda merged: 0.0)  # type: ignore[arg-type]
    model = Model(_Backbone(), _Residual(columns))  # type: ignore[arg-type]
    found = diagonal_fisher(model, Sample(ctx, CORNERS, count), "predictive", 0.99)["theta"]
    exact = columns.square().sum(0)
    # one sign vector: (zᵀa)² has variance 2 (|a|⁴ - Σ a_j⁴)
    noise = (2 * (exact.square() - columns.pow(4).sum(0)) / count).sqrt()
    assert bool(((found - exact).abs() < 5 * noise).all())


def test_regmean_of_one_generator_is_that_generator(corners: GenerationTask) -> None:
    catalog = load_catalog([MICRO_GENERATION])
    backbone = catalog.get("backbone", "micro/painter").create({})
    base = backbone.base_weights()
    generator = torch.Generator().manual_seed(1)
    weights = {
        n: t + 0.1 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for n, t in base.items()
    }
    tuning = corners.load(DataContext(CPU, 0))["tuning"]
    view = TaskView(corners, {}, tuning)
    ctx = MergeContext(CPU, 0, backbone, {CORNERS: view}, lambda merged: 0.0)
    merge = RegMean(num_examples=64, alpha=0.95)
    merged = merge.merge(base, [Expert(CORNERS, weights)], ctx)
    assert merged.info["linear_layers"] > 0
    assert not merged.info["linear_layers_averaged"]
    for name, tensor in weights.items():
        torch.testing.assert_close(merged.shared[name], tensor, atol=1e-4, rtol=1e-4)
    assert load_network(backbone, merged.shared) is not None
