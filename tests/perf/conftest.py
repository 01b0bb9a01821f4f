"""What is measured here is measured without what other tests left in the process."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def only_its_own_garbage() -> Iterator[None]:
    """After thousands of tests a full collection walks millions of objects, a second wherever it falls. Set apart,
    they are not walked; what the measured code makes itself is collected as ever, and counts."""
    gc.freeze()
    yield
    gc.unfreeze()
