"""Pytest fixtures over `RankPool`, for a `conftest.py` to import.

from sagellm.core.protocols.testing.pytest_plugin import rank_pool as rank_pool
from sagellm.core.protocols.testing.pytest_plugin import rank_pools as rank_pools
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from .rank_pool import RankPool

__all__ = ["rank_pool", "rank_pools"]


@pytest.fixture(scope="session")
def rank_pools() -> Iterator[Callable[[int], RankPool]]:
    """A function that gives the session's pool of a size, started at its first use."""
    pools: dict[int, RankPool] = {}

    def pool(size: int) -> RankPool:
        if size not in pools:
            pools[size] = RankPool(size)
        return pools[size]

    yield pool
    for started in pools.values():
        started.close()


@pytest.fixture(scope="session")
def rank_pool(rank_pools: Callable[[int], RankPool]) -> RankPool:
    """The session's pool of two ranks, each with torch imported."""
    return rank_pools(2)
