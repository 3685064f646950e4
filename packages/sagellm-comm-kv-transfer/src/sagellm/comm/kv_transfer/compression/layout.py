"""What a tensor of KV cache means, and how a frame cuts it into sections."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from sagellm.core.protocols import ConfigError
from sagellm.core.protocols.kv_layout import Axis

from .rope import RopeSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CHUNK_TOKENS", "MAX_SECTION_BYTES", "Geometry", "Kind", "Section", "TensorLayout"]

Kind = Literal["k", "v"]
CHUNK_TOKENS = 256  # tokens that share means and scales
MAX_SECTION_BYTES = 8 << 20  # of raw values: float32 copies of a section stay below 64 MiB
_SECTION_BYTES = 1 << 20
_ORDER: tuple[Axis, ...] = ("layer", "kv", "block", "token", "head", "dim")


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """What the dimensions of a tensor of KV cache mean.

    Attributes:
        axes: Meaning of each dimension; `token` and `dim` are required, `kv` has length 2, K
            first. With `block` the tokens of consecutive blocks follow one another.
        kind: What a tensor without a `kv` axis holds; latents without RoPE are like `v`.
        tokens: Tokens that hold values; what lies behind them is padding, which is neither read
            nor written. None: all.
        first_layer: Layer of the model that index 0 is.
        first_position: Position in the sequence of token 0.
        rope: How the model rotates keys; None when it does not, or when that is not known.
        model: Fingerprint of the model.

    """

    axes: tuple[Axis, ...]
    kind: Kind = "v"
    tokens: int | None = None
    first_layer: int = 0
    first_position: int = 0
    rope: RopeSpec | None = None
    model: str = ""

    def __post_init__(self) -> None:
        if len(set(self.axes)) != len(self.axes) or not {"token", "dim"} <= set(self.axes):
            raise ConfigError(f"axes {self.axes}: want each once, `token` and `dim` among them")
        if unknown := set(self.axes) - set(_ORDER):
            raise ConfigError(f"axes {sorted(unknown)} are unknown; known: {', '.join(_ORDER)}")
        if self.kind not in get_args(Kind):
            raise ConfigError(f"kind {self.kind!r} is neither 'k' nor 'v'")
        if min(self.first_layer, self.first_position, self.tokens or 0) < 0:
            raise ConfigError("first_layer, first_position and tokens are not negative")
        if self.first_layer >= 1 << 31 or self.first_position >= 1 << 40:
            raise ConfigError(f"layer {self.first_layer} or position {self.first_position} is wild")


@dataclass(frozen=True, slots=True)
class Section:
    """One piece that is coded alone: consecutive tokens of K or V of one layer.

    Attributes:
        index: In the frame.
        layer: Index along the tensor's `layer` axis.
        kv: Index along its `kv` axis.
        kind: K or V.
        start: First token.
        tokens: Number of tokens.
        position: Of the first token in the sequence.
        rope: How its values were rotated; None for V.
        model_layer: The model's layer that it begins with.

    """

    index: int
    layer: int
    kv: int
    kind: Kind
    start: int
    tokens: int
    position: int
    rope: RopeSpec | None
    model_layer: int = 0


class Geometry:
    """A tensor's shape read through its layout, and its sections.

    With `join` it is that of a tensor with so many times fewer layers and more heads.

    Args:
        shape: Of the tensor.
        layout: What its dimensions mean.
        item_bytes: Bytes of an element.
        span: Tokens per section; None chooses about 1 MiB of values.
        join: Layers of a section.

    Raises:
        ConfigError: Shape and layout do not fit, or one token takes more than 8 MiB.

    """

    def __init__(
        self, shape: tuple[int, ...], layout: TensorLayout, item_bytes: int,
        span: int | None = None, join: int = 1,
    ) -> None:  # fmt: skip
        if len(shape) != len(layout.axes):
            raise ConfigError(f"a tensor of shape {list(shape)} does not have axes {layout.axes}")
        if min(shape) < 0 or math.prod(max(n, 1) for n in shape) >= 1 << 50:
            raise ConfigError(f"shape {list(shape)} is not that of a KV cache")
        size = dict(zip(layout.axes, shape, strict=True))
        if size.get("kv", 2) != 2:
            raise ConfigError(f"the kv axis has length {size['kv']}, not 2 (K, V)")
        self.shape, self.layout, self.item_bytes = shape, layout, item_bytes
        layers, self.kvs = size.get("layer", 1), size.get("kv", 1)
        if join < 1 or layers % join:
            raise ConfigError(f"sections of {join} layers each do not divide {layers} layers")
        self.join, self.layers = join, layers // join
        self.page = size["token"]
        self.heads, self.dim = join * size.get("head", 1), size["dim"]
        held = size.get("block", 1) * self.page
        self.tokens = held if layout.tokens is None else layout.tokens
        if self.tokens > held:
            raise ConfigError(f"{self.tokens} tokens in a tensor for {held}")
        if layout.rope and layout.rope.dim > self.dim:
            raise ConfigError(f"RoPE over {layout.rope.dim} channels of heads of {self.dim}")
        self.row_bytes = self.heads * self.dim * item_bytes
        if self.row_bytes > MAX_SECTION_BYTES:
            raise ConfigError(
                f"one token takes {self.row_bytes} bytes, more than a section's {MAX_SECTION_BYTES}"
            )
        self.span = span or self._choose_span()
        if self.span * self.row_bytes > MAX_SECTION_BYTES:
            raise ConfigError(f"sections of {self.span} tokens exceed {MAX_SECTION_BYTES} bytes")
        self.per_part = -(-self.tokens // self.span) if self.row_bytes else 0
        self.sections = self.layers * self.kvs * self.per_part

    @property
    def raw_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.item_bytes

    def section(self, index: int) -> Section:
        """The section of that index: layer by layer, K before V, tokens in order."""
        part, nth = divmod(index, self.per_part)
        layer, kv = divmod(part, self.kvs)
        kind: Kind = self.layout.kind if self.kvs == 1 else ("k", "v")[kv]
        start = nth * self.span
        return Section(
            index, layer, kv, kind, start, min(self.span, self.tokens - start),
            self.layout.first_position + start, self.layout.rope if kind == "k" else None,
            self.layout.first_layer + layer * self.join,
        )  # fmt: skip

    def section_bytes(self, index: int) -> int:
        """Raw bytes of a section."""
        start = index % self.per_part * self.span
        return min(self.span, self.tokens - start) * self.row_bytes

    def canonical(self, tensor: Tensor) -> Tensor:
        """A view of the tensor as [layer, kv, block, token, head, dim].

        Heads of joined layers have a dimension before them, which no strides could merge.
        """
        axes = self.layout.axes
        view = tensor.permute([axes.index(a) for a in _ORDER if a in axes])
        for i, axis in enumerate(_ORDER):
            if axis not in axes:
                view = view.unsqueeze(i)
        if self.join == 1:
            return view
        return view.reshape(self.layers, self.join, *view.shape[1:]).movedim(1, 4)

    def pieces(self, view: Tensor, section: Section) -> Iterator[tuple[int, int, Tensor]]:
        """Views that make up a section: first and last token in it, and a [.., head, dim]."""
        at, end = section.start, section.start + section.tokens
        pages = view[section.layer, section.kv]
        while at < end:
            block, offset = divmod(at, self.page)
            whole = (end - at) // self.page if not offset else 0
            if whole:
                piece, count = pages[block : block + whole], whole * self.page
            else:
                count = min(self.page - offset, end - at)
                piece = pages[block, offset : offset + count]
            yield at - section.start, at - section.start + count, piece
            at += count

    def _choose_span(self) -> int:
        row = max(1, self.row_bytes)
        span = max(1, _SECTION_BYTES // row // CHUNK_TOKENS) * CHUNK_TOKENS
        return max(1, min(span, MAX_SECTION_BYTES // row))
