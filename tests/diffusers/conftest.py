"""Pipelines with random weights, saved once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from pipelines import save

from mergesec_tasks.diffusers._backbone import Denoising
from mergesec_tasks.diffusers.dit import Dit
from mergesec_tasks.diffusers.sd3 import StableDiffusion3
from mergesec_tasks.diffusers.unet import Unet

CLASSES: dict[str, type[Denoising]] = {"unet": Unet, "dit": Dit, "mmdit_normed": StableDiffusion3}


@pytest.fixture(scope="session")
def pipeline(once: Callable[..., Path]) -> Callable[[str], Path]:
    """The folder of a pipeline by its network's name."""
    return lambda name: once(f"pipeline-{name}", partial(_saved, name))


def _saved(name: str, folder: Path) -> None:
    save(name, folder)


@pytest.fixture(params=CLASSES)
def backbone(request: pytest.FixtureRequest, pipeline: Callable[[str], Path]) -> Denoising:
    return CLASSES[request.param](str(pipeline(request.param)), steps=3, guidance=2.0)
