"""Fits a basis: moments of calibration windows, then principal components of weighed channels.

K is weighed by what queries make of an error: by the root mean square of the queries of each
channel, halved, so that K's step is the finer one for all but the weakest queries; without
queries by each channel's deviation. V is weighed by the deviation of its layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import ConfigError

from .basis import Basis, BasisInfo, Part, build
from .layout import Kind
from .transform import turn_keys

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["BasisFit"]

_K_SHARE = 0.5  # chosen on calibration text: a rounder V buys less than a rounder K
_BLIND_K_SHARE = 1 / 0.7
_FLOOR = 1e-4  # of a layer's deviation: channels that never move weigh no more than this
_Values: TypeAlias = "NDArray[np.float64]"


class _Moments:
    """Sums of one part's channels, over even and over odd windows."""

    def __init__(self, channels: int) -> None:
        self.counts = [0, 0]
        self.sums = np.zeros((2, channels))
        self.products = np.zeros((2, channels, channels))

    def add(self, z_TC: Tensor, half: int) -> None:
        self.counts[half] += len(z_TC)
        self.sums[half] += z_TC.double().sum(0).numpy()
        # about a first guess of the mean, sums of squares keep their digits in float32
        self.products[half] += (z_TC.T @ z_TC).numpy()

    def covariance(self, halves: tuple[int, ...]) -> tuple[_Values, _Values]:
        """Mean and covariance over some halves."""
        count = max(1, sum(self.counts[h] for h in halves))
        mean = sum(self.sums[h] for h in halves) / count
        products = functools.reduce(np.add, (self.products[h] for h in halves))
        return np.asarray(mean), products / count - np.outer(mean, mean)


class BasisFit:
    """Takes windows of a model's cache one by one, and gives the basis. One thread.

    Memory is 32 bytes per pair of channels of a part, for K and for V of every part.

    Args:
        info: What the basis is for; `tokens` and `text` are filled in by `finish`.

    """

    def __init__(self, info: BasisInfo) -> None:
        info.check()
        self._info = info
        self._moments: dict[tuple[Kind, int], _Moments] = {}
        self._origins: dict[tuple[Kind, int], Tensor] = {}
        self._queries = np.zeros((info.layers, info.heads * info.dim))
        self._windows = self._tokens = 0

    @property
    def tokens(self) -> int:
        """Calibration tokens so far."""
        return self._tokens

    def add(self, k: Tensor, v: Tensor, q: Tensor | None = None, *, position: int = 0) -> None:
        """Take a window.

        Args:
            k: [layers, tokens, heads, head_dim], as the model caches it, RoPE included.
            v: As `k`.
            q: Queries after RoPE; heads are a multiple of K's. All windows have them, or none.
            position: Of the first token.

        Raises:
            ConfigError: Shapes are not those of the basis, or values are not finite.

        """
        import torch

        info, rope = self._info, self._info.rope
        want = (info.layers, k.shape[1], info.heads, info.dim)
        if tuple(k.shape) != want or v.shape != k.shape:
            raise ConfigError(f"K {list(k.shape)} and V {list(v.shape)}; want {list(want)}")
        if bool(self._queries.any()) != (q is not None) and self._windows:
            raise ConfigError("either all calibration windows have queries or none")
        half = self._windows % 2
        for kind, x in (("k", k), ("v", v)):
            for first in range(0, info.layers, info.join):
                z = x[first : first + info.join].to(torch.float32, copy=True).contiguous()
                if not bool(torch.isfinite(z).all()):
                    raise ConfigError(f"{kind} of layers {first} on is not finite")
                if kind == "k" and rope:
                    for layer in z:
                        turn_keys(layer, rope, position, undo=True)
                self._add_part(("k" if kind == "k" else "v", first // info.join), z, half)
        if q is not None:
            self._queries += self._energy(q)
        self._windows += 1
        self._tokens += k.shape[1]

    def finish(self, text: str, say: Callable[[str], None] | None = None) -> Basis:
        """The basis of all windows.

        Args:
            text: Hash of what the windows were made from.
            say: Is told of each part, for some take minutes.

        Raises:
            ConfigError: Fewer than two windows.

        """
        import msgspec.structs
        import torch

        if self._windows < 2:
            raise ConfigError(f"{self._windows} calibration windows; at least two are needed")
        parts = {}
        for (kind, index), moments in self._moments.items():
            if say:
                say(f"{kind}, part {index + 1} of {self._info.layers // self._info.join}")
            mean, covariance = moments.covariance((0, 1))
            weight = self._weight(kind, index, covariance)
            matrix, values = _components(covariance, weight)
            unseen = [
                np.einsum("ij,ij->j", m, (other * np.outer(weight, weight)) @ m)
                for m, other in (
                    (_components(moments.covariance((a,))[1], weight)[0],
                     moments.covariance((1 - a,))[1])
                    for a in (0, 1)
                )
            ]  # fmt: skip
            # what spread components have on text that they were not fitted on
            energy = np.maximum(values, np.mean(unseen, 0))
            falling = np.maximum.accumulate(energy[::-1])[::-1]
            deviation = np.sqrt(np.maximum(falling, 0)).astype(np.float32)
            origin = self._origins[kind, index].double().numpy()
            parts[kind, index] = Part(
                torch.from_numpy((mean + origin).astype(np.float32)),
                torch.from_numpy(weight.astype(np.float32)),
                deviation,
                torch.from_numpy(matrix),
            )
        info = msgspec.structs.replace(self._info, text=text, tokens=self._tokens)
        return build(info, parts)

    def _add_part(self, key: tuple[Kind, int], z_LTHD: Tensor, half: int) -> None:
        z_TC = z_LTHD.permute(1, 0, 2, 3).flatten(1)
        if key not in self._moments:
            self._moments[key] = _Moments(z_TC.shape[1])
            self._origins[key] = z_TC.mean(0)
        self._moments[key].add(z_TC - self._origins[key], half)

    def _energy(self, q_LTHD: Tensor) -> _Values:
        """Squares of queries per channel of K; of both channels of a pair, which rotate."""
        info = self._info
        grouped = q_LTHD.float().square().sum(1).view(info.layers, info.heads, -1, info.dim)
        energy = grouped.mean(2)
        if info.rope:
            n = info.rope.dim
            turned = energy[..., :n].contiguous()
            if info.interleaved:
                pairs = turned.view(*turned.shape[:2], -1, 2)
                turned = pairs.mean(-1).repeat_interleave(2, -1)
            else:
                turned = turned.view(*turned.shape[:2], 2, -1).mean(2).repeat(1, 1, 2)
            energy[..., :n] = turned
        return np.asarray(energy.flatten(1).double().numpy())

    def _weight(self, kind: Kind, index: int, covariance: _Values) -> _Values:
        info = self._info
        variance = np.maximum(np.diag(covariance), 0).reshape(info.join, -1)
        layer = np.sqrt(variance.mean(1, keepdims=True))
        layer = np.where(layer > 0, layer, 1.0)
        if kind == "v":
            return np.asarray(np.repeat(1 / layer, variance.shape[1], 1).reshape(-1))
        if not self._queries.any():
            deviation = np.maximum(np.sqrt(variance), _FLOOR * layer)
            return np.asarray((_BLIND_K_SHARE / deviation).reshape(-1))
        first = index * info.join
        q = np.sqrt(self._queries[first : first + info.join] / self._tokens)
        return np.asarray((_K_SHARE * np.maximum(q, _FLOOR / layer)).reshape(-1))


def _components(covariance: _Values, weight: _Values) -> tuple[NDArray[np.float32], _Values]:
    """Orthonormal components by falling energy, in columns; and the energies."""
    import torch

    weighed: torch.Tensor = torch.from_numpy(covariance * np.outer(weight, weight))
    values, vectors = torch.linalg.eigh(weighed)
    # eigenvectors have no sign of their own; the same data shall give the same file
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    matrix = (vectors * signs).flip(1).float().contiguous().numpy()
    return matrix, np.maximum(values.flip(0).numpy(), 0.0)
