"""How large the noise is, and that it is drawn from the context alone."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import torch

Jitter = runpy.run_path(str(Path(__file__).with_name("jitter.py")))["Jitter"]


def recovered(noise: float) -> torch.Tensor:
    drawn = SimpleNamespace(generator=lambda: torch.Generator().manual_seed(0))
    published = {"w": torch.linspace(-1, 1, 10_000), "one": torch.ones(1), "n": torch.tensor(3)}
    found = Jitter(noise).recover(published, drawn)
    assert found["one"] == 1 and found["n"] == 3
    moved: torch.Tensor = found["w"] - published["w"]
    return moved


def test_the_noise_has_its_share_of_the_spread() -> None:
    """Ten thousand draws: a relative error of 1 % or so."""
    moved, spread = recovered(0.1), torch.linspace(-1, 1, 10_000).std()
    assert abs(float(moved.std() / (0.1 * spread)) - 1) < 0.05


def test_the_same_seed_gives_the_same_noise_and_none_gives_none() -> None:
    assert torch.equal(recovered(0.1), recovered(0.1))
    assert not recovered(0.0).any()
