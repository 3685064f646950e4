"""What a caller asks of a codec for one transfer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

from sagellm.core.protocols import ConfigError

from .compression import Compressor, RopeSpec
from .compression._registry import section_codec_spec
from .compression.auto import NEAR, MaxError, candidates, quant_within
from .compression.frame import Coding, Option

if TYPE_CHECKING:
    from . import wire

__all__ = ["AUTO", "CodecRequest", "asked_of", "request_of", "requested", "wanted_of"]

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class CodecRequest:
    """How blocks are coded on their way, for callers that know more than a codec's name.

    Attributes:
        codec: Name of a codec, or `auto`.
        options: Of the codec.
        max_error: What `auto` may change, and what `quant` without a `step` may: nothing, 1/32,
            or so many standard deviations of a channel.
        rope: How the model rotates keys; None when it does not, or when that is not known.
        first_position: Position in the sequence of the first block's first token.
        num_tokens: Tokens that hold values; what lies behind them in the last block is not sent.
            None: all.
        required: Whether a peer that cannot decode it fails the transfer; else such a peer, and
            one that reads our memory in place, gets the bytes as they are.

    """

    codec: str = AUTO
    options: Mapping[str, Option] = field(default_factory=dict)
    max_error: MaxError | None = None
    rope: RopeSpec | None = None
    first_position: int = 0
    num_tokens: int | None = None
    required: bool = True

    def allowed(self) -> tuple[Coding, ...]:
        """The codings that may be used; one for a named codec.

        Raises:
            ConfigError: No such codec, options that it does not have, or an error it cannot keep.
            BackendUnavailableError: What it needs is missing.

        """
        if self.codec == AUTO:
            if self.options:
                raise ConfigError(f"codec 'auto' takes no options: {dict(self.options)}")
            return candidates("lossless" if self.max_error is None else self.max_error)
        options = dict(self.options)
        if self.max_error is not None:
            candidates(self.max_error)  # which checks it
            if self.codec == "quant" and not options and self.max_error != "lossless":
                bound = NEAR if self.max_error == "near" else float(self.max_error)
                options = dict(quant_within(bound).options)
            elif not section_codec_spec(self.codec).lossless:
                raise ConfigError(
                    f"codec {self.codec!r} cannot promise max_error={self.max_error!r}: "
                    "leave it out, or use 'auto', 'quant' or 'lossless'"
                )
        coding = Coding(self.codec, options)
        Compressor.of(coding)  # which checks both
        return (coding,)

    @property
    def lossless(self) -> bool:
        """Whether the same bits arrive, whatever is chosen."""
        return all(section_codec_spec(c.name).lossless for c in self.allowed())


def requested(fetch: wire.Fetch, offered: CodecRequest | None) -> CodecRequest | None:
    """What a peer asks for that fetches.

    Args:
        fetch: What it says.
        offered: What the offer says, whose model and positions hold where all its blocks move.

    Raises:
        ConfigError: It makes no sense here.
        BackendUnavailableError: What the codec needs is missing.

    """
    error = fetch.max_error
    if isinstance(error, str) and error not in ("lossless", "near"):
        raise ConfigError(f"max_error {error!r} is not 'lossless', 'near' or a number")
    made = CodecRequest(fetch.codec, fetch.options, cast("MaxError | None", error))
    if offered is not None and fetch.src_blocks is None:
        made = replace(
            made,
            rope=offered.rope,
            first_position=offered.first_position,
            num_tokens=offered.num_tokens,
        )
    return request_of(made, None)


def request_of(
    codec: str | CodecRequest | None, max_error: MaxError | None, default: str = "none"
) -> CodecRequest | None:
    """What a call asks for; None sends the bytes as they are.

    Raises:
        ConfigError: The arguments do not fit one another, or no codec.
        BackendUnavailableError: What the codec needs is missing.

    """
    if isinstance(codec, CodecRequest):
        if max_error is not None:
            raise ConfigError("max_error stands in the CodecRequest already")
        made = codec
    else:
        if codec is None and max_error is not None:
            raise ConfigError("max_error needs a codec, such as codec='auto'")
        name = default if codec is None else codec
        if name == "none":
            return None
        made = CodecRequest(name, max_error=max_error, required=codec is not None)
    if made.first_position < 0 or (made.num_tokens or 0) < 0:
        raise ConfigError("first_position and num_tokens are not negative")
    made.allowed()
    return None if made.codec == "none" else made


def wanted_of(
    codec: str | CodecRequest | None, max_error: MaxError | None, default: CodecRequest | None
) -> CodecRequest | None:
    """As `request_of`, where a channel has a codec of its own for calls that name none."""
    return default if codec is None and max_error is None else request_of(codec, max_error)


def asked_of(codec: str | None, max_error: MaxError | None) -> CodecRequest | None:
    """What a fetch asks of whoever offers; None leaves it to that one, `none` to the bytes.

    Raises:
        ConfigError: As `request_of`.
        BackendUnavailableError: As `request_of`.

    """
    if codec == "none" and max_error is None:
        return CodecRequest("none")
    return request_of(codec, max_error)
