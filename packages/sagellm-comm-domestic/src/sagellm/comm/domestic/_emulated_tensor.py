"""Tensors that say they are on an emulated device and keep their bytes on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from sagellm.core.protocols import UnsupportedOperationError

__all__ = ["EmulatedTensor", "install_kernels", "raw_of"]

_FACTORIES_AND_VIEWS = (
    "empty.memory_format",
    "empty_strided",
    "view",
    "as_strided",
    "_reshape_alias",
    "arange",
    "arange.start",
    "arange.start_step",
    "linspace",
    "eye",
    "eye.m",
    "randperm",
)
"""Operators that torch never hands to a fallback."""


class EmulatedTensor(torch.Tensor):
    """A shell on the emulated device around `raw`, a CPU tensor."""

    # Without this, `.cpu()` would come back as a shell.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's idiom

    raw: torch.Tensor

    @staticmethod
    def __new__(cls: type[EmulatedTensor], raw: torch.Tensor) -> EmulatedTensor:
        create = torch._C._acc.create_empty_tensor
        shell: Any = create(tuple(raw.shape), raw.dtype)  # becomes an EmulatedTensor below
        shell.__class__ = EmulatedTensor
        return shell  # type: ignore[no-any-return]  # see above

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw = raw

    def __repr__(self, **named: object) -> str:  # type: ignore[override]  # torch's own is odd
        return f"{self.raw!r}[{self.device}]"


def raw_of(value: object) -> object:
    """The CPU tensor beneath a shell; anything else as it is."""
    return value.raw if isinstance(value, EmulatedTensor) else value


def _shell(value: object) -> object:
    if isinstance(value, torch.Tensor) and not isinstance(value, EmulatedTensor):
        return EmulatedTensor(value)
    return value


def _on_cpu(device: str, op: Any, args: Any, kwargs: dict[str, Any]) -> Any:  # noqa: ANN401  # torch operators take anything
    """Run an operator on the CPU bytes and put its results back into shells."""
    wanted = kwargs.get("device")
    if wanted is not None and torch.device(wanted).type == device:
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    shells = {id(x.raw): x for x in leaves if isinstance(x, EmulatedTensor)}
    if any(
        isinstance(x, torch.Tensor) and raw_of(x) is x and x.device.type == device for x in leaves
    ):
        raise UnsupportedOperationError(
            f"{op} made a tensor that the emulated device does not hold"
        )
    raw_args, raw_kwargs = pytree.tree_unflatten([raw_of(x) for x in leaves], spec)
    out = op(*raw_args, **raw_kwargs)
    for shell in shells.values():
        if shell.shape != shell.raw.shape:
            raise UnsupportedOperationError(f"{op} resizes an emulated tensor, which cannot follow")
    return pytree.tree_map(lambda x: shells[id(x)] if id(x) in shells else _shell(x), out)


def install_kernels(device: str) -> object:
    """Give the emulated device every operator of the CPU; keep the result to keep them."""
    make: Any = torch.library.Library  # without annotations in torch
    fallback = make("_", "IMPL")
    fallback.fallback(lambda op, *args, **kwargs: _on_cpu(device, op, args, kwargs), "PrivateUse1")
    aten = make("aten", "IMPL")
    for name in _FACTORIES_AND_VIEWS:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        aten.impl(name, _kernel(device, op), "PrivateUse1")
    # Autograd makes such a view a copy of the tensor object, which would lose the shell.
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        aten.impl("view.dtype", _kernel(device, torch.ops.aten.view.dtype), key)
    aten.impl("_copy_from", _copy_from, "PrivateUse1")
    aten.impl("_local_scalar_dense", lambda x: x.raw.item(), "PrivateUse1")
    return (fallback, aten)


def _kernel(device: str, op: Any) -> Any:  # noqa: ANN401  # torch operators have no common type
    return lambda *args, **kwargs: _on_cpu(device, op, args, kwargs)


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> object:
    raw_target = raw_of(target)
    assert isinstance(raw_target, torch.Tensor)
    raw_target.copy_(raw_of(source))  # type: ignore[arg-type]  # a tensor, shell or not
    return target
