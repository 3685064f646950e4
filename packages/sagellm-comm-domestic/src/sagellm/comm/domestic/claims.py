"""Measured bandwidth beside what is claimed, without pretending that the two always compare."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm.core.protocols import ConfigError, Efficiency, LinkClaim

__all__ = ["one_direction", "rate"]


def one_direction(claim: LinkClaim) -> float | None:
    """The claim per direction in bytes per second, None when value or direction is unknown."""
    if claim.bytes_per_s is None or claim.direction == "unstated":
        return None
    return claim.bytes_per_s / (2 if claim.direction == "bidirectional" else 1)


def rate(claims: Sequence[LinkClaim], part: str, measured_bytes_per_s: float) -> Efficiency:
    """A measured one-direction bandwidth as a share of the claim for `part`.

    The measurement must count what the claim counts (`scope`): the traffic of one link, of one
    pair of devices, or of everything that leaves one device.

    Raises:
        ConfigError: The measurement is not above 0.

    """
    if not measured_bytes_per_s > 0:
        raise ConfigError(f"measured_bytes_per_s must be above 0, got {measured_bytes_per_s}")
    measured = f"measured {measured_bytes_per_s / 1e9:.1f} GB/s"
    claim = next((c for c in claims if c.part.lower() == part.strip().lower()), None)
    if claim is None:
        known = ", ".join(c.part for c in claims) or "none"
        return Efficiency(
            measured_bytes_per_s, None, None, f"{measured}; no claim for {part!r}, only {known}"
        )
    if claim.bytes_per_s is None:
        text = f"{measured}; nothing is claimed for {claim.part} ({claim.source})"
        return Efficiency(measured_bytes_per_s, claim, None, text)
    stated = f"{claim.bytes_per_s / 1e9:.0f} GB/s claimed per {claim.scope} ({claim.direction})"
    base = one_direction(claim)
    if base is None:
        text = f"{measured}; {stated}: the direction is not stated ({claim.source})"
        return Efficiency(measured_bytes_per_s, claim, None, text)
    ratio = measured_bytes_per_s / base
    text = f"{measured} of {base / 1e9:.0f} GB/s one way: {stated}, {claim.grade} ({claim.source})"
    return Efficiency(measured_bytes_per_s, claim, ratio, text)
