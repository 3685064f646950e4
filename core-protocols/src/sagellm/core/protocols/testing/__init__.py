"""The conformance kit: contract suites for any implementation of the shared interfaces."""

from .rank_pool import (
    RankFailedError as RankFailedError,
    RankJob as RankJob,
    RankOutcome as RankOutcome,
    RankPool as RankPool,
    RankRunner as RankRunner,
    ThreadRanks as ThreadRanks,
    torch_group as torch_group,
)

__all__ = [
    "RankFailedError",
    "RankJob",
    "RankOutcome",
    "RankPool",
    "RankRunner",
    "ThreadRanks",
    "torch_group",
]
