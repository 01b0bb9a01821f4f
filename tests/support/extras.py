"""What a test needs that not every installation has."""

from __future__ import annotations

from typing import Any

import pytest

from mergesec.compat import ensure_torchvision

EXTRAS = {
    "open_clip": "clip", "timm": "timm", "transformers": "real", "tokenizers": "real", "pyarrow": "real",
    "fusion_bench": "fusionbench", "peft": "fusionbench", "numba": "fast", "matplotlib": "plots", "jinja2": "site",
    "datasets": "hub", "huggingface_hub": "hub", "diffusers": "diffusion",
}  # fmt: skip
"""The extra of ``mergesec`` that brings a package, by the package's import name."""
WITHOUT_TORCHVISION = {
    "pyarrow",
    "numba",
    "matplotlib",
    "jinja2",
    "datasets",
    "huggingface_hub",
    "tokenizers",
}
"""Those whose import cannot meet a torchvision that was built for another torch."""


def needs(module: str) -> Any:
    """The module; without it the test, or the file that calls this at its top, is skipped and says why."""
    package = module.split(".", 1)[0]
    if package not in WITHOUT_TORCHVISION:
        ensure_torchvision()
    reason = f"'{package}' is not installed (pip install 'mergesec[{EXTRAS[package]}]')"
    return pytest.importorskip(module, reason=reason, exc_type=ImportError)
