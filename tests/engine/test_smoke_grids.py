"""A ``-smoke`` preset is the whole road of its grid in minutes; here most run as shipped, or on a tiny model."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from extras import needs

from mergesec.planning.catalog import load_catalog
from mergesec.planning.presets import preset_names

MINI = {
    "mini-text-backdoor-smoke": ("backdoor", {"phrase", "rare_token", "merge_hijacking", "lora_phrase"}),
    "mini-backdoor-transfer-smoke": ("transfer", {"universal_perturbation"}),
    "mini-backdoor-screens-smoke": ("backdoor", {"none", "badnets"}),
    "mini-backdoor-cleanse-smoke": ("backdoor", {"none", "badmerging_screened", "badmerging_decoys"}),
    "mini-backdoor-adaptive-smoke": ("backdoor", {"badmerging", "badmerging_adaptive"}),
    "mini-backdoor-siblings-smoke": ("backdoor", {"none", "badmerging", "badmerging_adaptive"}),
    "mini-backdoor-coefficients-smoke": ("backdoor", {"trojvit", "badmerging"}),
    "mini-backdoor-masks-smoke": ("backdoor", {"trojvit"}),
    "mini-backdoor-colluding-smoke": ("backdoor", {"colluding_pair"}),
    "mini-protection-frontier-smoke": ("protection_cells", {"none", "coupled", "scale_sweep", "distill"}),
}
MERGES = {"mini-merging-features-smoke": {"task_arithmetic", "regmean", "lot", "cat"}}
MODELS = {
    "real-llm-secrets-smoke": "secrets",
    "real-llm-refusal-smoke": "refusal",
}


def _rows(bench: Any, grid: str, board: str) -> list[dict[str, str]]:
    with (bench.results / "leaderboards" / grid / f"{board}.csv").open() as file:
        return list(csv.DictReader(file))


def _ran(bench: Any, grid: str, *more: str) -> None:
    """All cells of a grid, with a record each."""
    ran = bench(
        "run", "--grid", grid, *more, "--jobs", "1", "--device", "cpu", "--results", str(bench.results)
    )
    assert ran.code == 0, ran.err
    folder = bench.results / "records" / grid
    planned = bench("plan", "--grid", grid, *more).out
    assert f"cells: {len(list(folder.glob('*.json'))) - 1} (" in planned  # grid.json lies beside them


def test_every_smoke_grid_is_run_somewhere() -> None:
    elsewhere = {
        "mini-clip-smoke",  # tests/vision/test_mini_clip.py
        "real-llm-smoke",  # below
        "real-llm-many-smoke",
        "real-smoke",  # its data sets are real: by hand
    }
    assert {name for name in preset_names() if name.endswith("-smoke")} == {
        *MINI,
        *MERGES,
        *MODELS,
        *elsewhere,
    }


@pytest.mark.slow
@pytest.mark.parametrize("grid", MINI)
def test_of_the_small_suites(bench: Any, grid: str) -> None:
    board, attacks = MINI[grid]
    _ran(bench, grid)
    rows = _rows(bench, grid, board)
    assert attacks <= {row["attack"].partition("(")[0] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("grid", MERGES)
def test_of_merges(bench: Any, grid: str) -> None:
    _ran(bench, grid)
    assert MERGES[grid] <= {row["method"].partition("(")[0] for row in _rows(bench, grid, "clean")}


@pytest.mark.slow
@pytest.mark.parametrize("grid", MODELS)
def test_of_language_models_on_a_tiny_one(bench: Any, tmp_path: Path, grid: str) -> None:
    needs("transformers")
    from letters import letters_model

    folder = letters_model(tmp_path / "model", [" allowed", " forbidden"])
    _ran(bench, grid, f"suite.backbone.path={folder}", "suite.backbone.max_length=160")
    assert len(_rows(bench, grid, MODELS[grid])) >= 3


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("grid", ["real-llm-smoke", "real-llm-many-smoke"])
def test_of_three_threats_on_a_tiny_language_model(
    bench: Any, tmp_path: Path, shared: Path, grid: str
) -> None:
    needs("transformers")
    from letters import letters_model

    catalog = load_catalog()
    tasks = [catalog.get("task", name).card for name in ("emotion", "mini/topic", "mini/sentiment")]
    labels = [f" {label}" for card in tasks for label in card.labels]
    folder = letters_model(tmp_path / "model", [*labels, " allowed", " forbidden"])
    _ran(bench, grid, f"suite.backbone.path={folder}", "suite.backbone.max_length=160",
         "recipe.steps=2", "--data-root", str(shared / "data"))  # fmt: skip
    for board in ("clean", "protection", "backdoor"):
        assert _rows(bench, grid, board)
