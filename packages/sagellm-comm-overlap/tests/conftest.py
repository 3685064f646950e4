"""Fixtures: managers that must leave no thread behind, and ranks in long-lived processes."""

import threading

import pytest
from hypothesis import settings

from sagellm.comm.overlap import OverlapManager
from sagellm.core.protocols.testing.pytest_plugin import (
    rank_pool as rank_pool,
    rank_pools as rank_pools,
)

settings.register_profile("shared machine", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("shared machine")


@pytest.fixture
def make_manager():
    """Makes managers with a short deadline; none may leave a thread."""
    before = set(threading.enumerate())
    made = []

    def make(**options):
        made.append(OverlapManager(**{"device": "cpu", "timeout_s": 10.0, **options}))
        return made[-1]

    yield make
    for manager in made:
        manager.close()
    assert set(threading.enumerate()) <= before


@pytest.fixture
def manager(make_manager):
    """A manager with default policy."""
    return make_manager()
