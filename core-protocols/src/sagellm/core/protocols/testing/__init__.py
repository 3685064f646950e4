"""The conformance kit: contract suites for any implementation of the shared interfaces.

From pytest: `check_backend("mock").ok()`, or one `check_…` per suite; from the command line:
`python -m sagellm.core.protocols.testing --backend mod:Class`. Needs the extra `[testing]`.
"""

from .codec_suite import check_codec as check_codec
from .comm_suite import check_backend as check_backend
from .contract import (
    CONTRACT_VERSION as CONTRACT_VERSION,
    Check as Check,
    Entry as Entry,
    Report as Report,
)
from .detector_suite import check_detector as check_detector
from .overlap_suite import check_overlap_manager as check_overlap_manager
from .rank_pool import (
    RankFailedError as RankFailedError,
    RankJob as RankJob,
    RankOutcome as RankOutcome,
    RankPool as RankPool,
    RankRunner as RankRunner,
    ThreadRanks as ThreadRanks,
    torch_group as torch_group,
)
from .targets import BackendTarget as BackendTarget
from .transport_suite import check_transport as check_transport

__all__ = [
    "CONTRACT_VERSION",
    "BackendTarget",
    "Check",
    "Entry",
    "RankFailedError",
    "RankJob",
    "RankOutcome",
    "RankPool",
    "RankRunner",
    "Report",
    "ThreadRanks",
    "check_backend",
    "check_codec",
    "check_detector",
    "check_overlap_manager",
    "check_transport",
    "torch_group",
]
