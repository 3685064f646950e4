"""What a domestic accelerator's communication adds to `CommBackendProtocol`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from .comm_backend import CommBackendProtocol

__all__ = ["DomesticCommBackend", "Efficiency", "EvidenceGrade", "LinkClaim"]

EvidenceGrade = Literal["vendor-source", "vendor-document", "third-party", "unverified"]
"""How well a fact about a vendor is known; from reading its source down to hearsay."""


@dataclass(frozen=True, slots=True)
class LinkClaim:
    """A bandwidth that a vendor or document states for a part.

    Attributes:
        part: The accelerator, such as `910B`.
        bytes_per_s: The stated value, None when no public figure exists.
        direction: What the figure counts.
        scope: One link, one pair of devices, or all links of one device.
        grade: How well it is known.
        source: Where it stands.

    """

    part: str
    bytes_per_s: float | None
    direction: Literal["unidirectional", "bidirectional", "unstated"]
    scope: Literal["link", "pair", "device"]
    grade: EvidenceGrade
    source: str


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Measured bandwidth beside the claim; `ratio` is None when the claim cannot be compared."""

    measured_bytes_per_s: float
    claim: LinkClaim | None
    ratio: float | None
    reason: str


class DomesticCommBackend(CommBackendProtocol):
    """A `CommBackendProtocol` on a domestic accelerator, with what its vendor states about it."""

    @property
    @abstractmethod
    def vendor(self) -> str:
        """Lower-case vendor, such as `huawei`."""

    @property
    @abstractmethod
    def library(self) -> str:
        """The collective library beneath, such as `HCCL`, whatever torch calls it."""

    @abstractmethod
    def link_claims(self) -> tuple[LinkClaim, ...]:
        """Stated bandwidths of the vendor's parts."""

    @abstractmethod
    def efficiency(self, part: str, measured_bytes_per_s: float) -> Efficiency:
        """Compare a measured one-direction bandwidth with what is claimed for `part`.

        Returns a ratio of None, with the reason, when no claim or no direction is stated.
        """

    @abstractmethod
    def self_test(self) -> tuple[str, ...]:
        """Run a known pattern through every operation; the names of those that came back wrong.

        Collective. Some driver releases return success and zeros: this finds them.
        """
