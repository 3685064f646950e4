"""Fixtures of the kit, tested by using them."""

from sagellm.core.protocols.testing.pytest_plugin import (
    rank_pool as rank_pool,
    rank_pools as rank_pools,
)
