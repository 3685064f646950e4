"""Options that reach a vendor's library, or are refused; none is swallowed.

An option reaches a library only through `pg_options` at the moment a group is made, and a
vendor replaces an object of a class that is not its own by defaults without a word.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, TypeAlias

from sagellm.core.protocols import BackendUnavailableError, ConfigError

from .vendor_spec import VendorSpec

__all__ = ["build_pg_options", "check_options", "delivered_options", "vendor_options"]

_Options: TypeAlias = Any
"""A vendor's options object, a class of its own C++ side."""


def vendor_options(row: VendorSpec, options: Mapping[str, object] | None) -> dict[str, object]:
    """The part of `options` that belongs to the vendor's library, checked."""
    chosen = {k: v for k, v in (options or {}).items() if k in row.options}
    check_options(row, chosen)
    return chosen


def check_options(row: VendorSpec, options: Mapping[str, object]) -> None:
    """Check names and types.

    Raises:
        ConfigError: An option the library does not have or cannot be given, or a value of
            another type or below zero.

    """
    for name, value in options.items():
        if name not in row.options:
            known = ", ".join(row.options) or "none that can be delivered"
            raise ConfigError(f"{row.library} has no option {name!r}; known: {known}")
        kind, _ = row.options[name]
        # bool is an int to Python, and not to the vendor.
        if type(value) is not kind:
            raise ConfigError(
                f"option {name} of {row.library} is {value!r}; it takes {kind.__name__}"
            )
        if kind is int and isinstance(value, int) and value < 0:
            raise ConfigError(f"option {name} of {row.library} is {value}; it is at least 0")


def build_pg_options(row: VendorSpec, options: Mapping[str, object]) -> _Options:
    """The vendor's own options object, None when there is nothing to deliver.

    The plug-in must have been loaded.

    Raises:
        BackendUnavailableError: The plug-in does not have the class the row says it has.

    """
    if not options:
        return None
    assert row.options_path is not None  # check_options refused what no class can hold
    where, _, attribute = row.options_path.partition(":")
    try:
        made: _Options = importlib.import_module(where)
        for part in attribute.split("."):
            made = getattr(made, part)
        made = made()
    except Exception as e:  # the class belongs to the vendor
        raise BackendUnavailableError(
            f"options {', '.join(options)} cannot reach {row.library}: {row.options_path} failed: "
            f"{type(e).__name__}: {e}; leave them out, or install the plug-in of {row.source}"
        ) from e
    if row.options_attribute is not None:
        setattr(made, row.options_attribute, dict(options))
    else:
        for name, value in options.items():
            setattr(made, name, value)
    return made


def delivered_options(row: VendorSpec, library_group: _Options) -> dict[str, object] | None:
    """The options a group of the library runs with, None when it does not show them."""
    held = getattr(library_group, "options", None)
    if held is None:
        return None
    if row.options_attribute is not None:
        config = getattr(held, row.options_attribute, None)
        return dict(config) if isinstance(config, Mapping) else None
    if not all(hasattr(held, name) for name in row.options):
        return None
    return {name: getattr(held, name) for name in row.options}
