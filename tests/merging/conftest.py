"""What the tests of merge methods share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from extras import needs


@pytest.fixture(scope="session")
def installed() -> Callable[[str], Any]:
    """Imports a module that a wrong torchvision would break; without its package the test is skipped."""
    return needs
