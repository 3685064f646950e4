"""Codecs found by entry point."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping

from sagellm.core.protocols import (
    BackendUnavailableError,
    CodecSpec,
    CommError,
    ConfigError,
    KVCodec,
)
from sagellm.core.protocols.registry import Registry

from .codec import SectionCodec
from .frame import VERSION, Option

__all__ = [
    "BASIS",
    "CODEC_GROUP",
    "FRAME",
    "codec_names",
    "coded_versions",
    "create_codec",
    "create_section_codec",
    "load_codec_spec",
    "section_codec_spec",
]

CODEC_GROUP = "sagellm.comm.kv_transfer.codecs"

logger = logging.getLogger(__name__)

_registry: Registry[CodecSpec] = Registry(CODEC_GROUP)
_FITTING: dict[str, tuple[type, ...]] = {
    "bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)
}  # fmt: skip


def codec_names() -> tuple[str, ...]:
    """Names of the installed codecs, sorted."""
    return _registry.names()


FRAME = "frame"
"""Stands for the format of frames among the versions that peers tell each other."""

BASIS = "basis"
"""Stands for the messages by which bases are handed over, among the same."""


def coded_versions() -> dict[str, int]:
    """The codecs that frames can be written with here, with the version of what they write."""
    found = {FRAME: VERSION, BASIS: 1}
    for name in codec_names():
        try:
            make = section_codec_spec(name).load()
        except (CommError, ImportError) as e:
            logger.debug("codec %r is not offered to peers: %s", name, e)
            continue
        if not isinstance(make, type) or issubclass(make, SectionCodec):
            found[name] = int(getattr(make, "version", 1))
    return found


def section_codec_spec(name: str) -> CodecSpec:
    """The codec of that name, checked to be usable here.

    Raises:
        ConfigError: No such codec; the message lists the installed ones.
        BackendUnavailableError: What it needs is missing.

    """
    spec = _registry.load(name)
    probe = spec.probe()
    if not probe.available:
        raise BackendUnavailableError(f"codec {name!r}: {probe.reason}")
    return spec


def load_codec_spec(name: str) -> CodecSpec:
    """The codec of that name, checked to be usable here for blocks of bytes.

    Raises:
        ConfigError: No such codec, or it needs to know what the values mean.
        BackendUnavailableError: What it needs is missing.

    """
    spec = section_codec_spec(name)
    make = spec.load()
    if isinstance(make, type) and not issubclass(make, KVCodec):
        raise ConfigError(
            f"codec {name!r} ({make.__name__}) does not code blocks of bytes: it needs a "
            f"tensor's layout, as `Compressor({name!r})` gets"
        )
    return spec


def create_codec(name: str) -> KVCodec:
    """A codec of blocks of bytes, for one thread; raises as `load_codec_spec`."""
    codec = load_codec_spec(name).load()()
    if not isinstance(codec, KVCodec):
        raise ConfigError(f"codec {name!r} gave {type(codec).__name__}, which is no KVCodec")
    return codec


def _check_types(name: str, make: Callable[..., object], options: Mapping[str, Option]) -> None:
    """Raise `ConfigError` for options, which a peer may have sent, of another type than stated."""
    parameters = inspect.signature(make).parameters
    for key, value in options.items():
        stated = getattr(parameters.get(key), "annotation", "")
        want = stated if isinstance(stated, str) else getattr(stated, "__name__", "")
        if want in _FITTING and type(value) not in _FITTING[want]:
            raise ConfigError(f"codec {name!r}: {key}={value!r} is not of type {want}")


def create_section_codec(name: str, options: Mapping[str, Option]) -> SectionCodec:
    """A codec of sections, for one thread.

    Raises:
        ConfigError: No such codec, options that it does not have, or it only codes bytes.
        BackendUnavailableError: What it needs is missing.

    """
    make = section_codec_spec(name).load()
    _check_types(name, make, options)
    try:
        codec = make(**options)
    except TypeError as e:
        raise ConfigError(f"codec {name!r} with options {dict(options)}: {e}") from None
    if not isinstance(codec, SectionCodec):
        raise ConfigError(f"codec {name!r} gave {type(codec).__name__}, which is no SectionCodec")
    return codec
