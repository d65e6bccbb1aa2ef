"""The two checkpoints of a scoring run."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reference_model(make_model: Callable[..., Path]) -> Path:
    """The checkpoint that plays the reference."""
    return make_model(seed=0)


@pytest.fixture(scope="session")
def base_model(make_model: Callable[..., Path]) -> Path:
    """The checkpoint that plays the base."""
    return make_model(seed=1)
