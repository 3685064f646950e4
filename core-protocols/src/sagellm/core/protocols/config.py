"""Settings of every package: where each value comes from, and what is refused.

For one package, `kv_transfer` say, a field `chunk_bytes` is looked up in this order:

1. an argument: `ChannelSettings.load(chunk_bytes=1 << 20)`
2. the environment: `SAGELLM_COMM_KV_TRANSFER_CHUNK_BYTES`; `__` reaches into a nested section
3. the YAML file that `SAGELLM_COMM_CONFIG` names, in its section `kv_transfer:`
4. the default of the field

A name that nobody knows is refused, with the nearest one that somebody does. A field declared
as `pydantic.SecretStr` is shown as stars in messages and descriptions. Nothing is read when
this module is imported, and nothing is remembered between two calls of `load`.
"""

from __future__ import annotations

import difflib
import logging
import os
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, Union, get_args, get_origin

import pydantic
import yaml

from .errors import ConfigError

__all__ = ["CONFIG_VARIABLE", "ENV_PREFIX", "SETTINGS_GROUP", "Section", "Settings", "load_all"]

logger = logging.getLogger(__name__)

ENV_PREFIX = "SAGELLM_COMM_"
"""Start of every environment variable that this family of packages reads."""

CONFIG_VARIABLE = "SAGELLM_COMM_CONFIG"
"""Environment variable with the path of the YAML file."""

SETTINGS_GROUP = "sagellm.comm.settings"
"""Entry-point group: the name is a package's section, the value its `Settings` subclass."""

_DISTRIBUTIONS = {
    "collective_ops": "sagellm-comm-collective-ops",
    "domestic": "sagellm-comm-domestic",
    "kv_transfer": "sagellm-comm-kv-transfer",
    "overlap": "sagellm-comm-overlap",
    "topology": "sagellm-comm-topology",
}

_Path = tuple[str, ...]


class Section(pydantic.BaseModel):
    """A nested part of a package's settings: frozen, and unknown keys are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Settings(pydantic.BaseModel):
    """The settings of one package; subclass it with `package="name"` and add fields.

    Instances are frozen. `load` is the way to make one; calling the class takes arguments and
    defaults only.

    >>> class Example(Settings, package="example"):
    ...     chunk_bytes: int = 65536
    >>> settings = Example.load({"SAGELLM_COMM_EXAMPLE_CHUNK_BYTES": "4096"})
    >>> settings.chunk_bytes, settings.origin("chunk_bytes")
    (4096, 'environment SAGELLM_COMM_EXAMPLE_CHUNK_BYTES')
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    package: ClassVar[str] = ""
    env_names: ClassVar[Mapping[str, str]] = {}
    """Variables outside `env_prefix()` and the field that each sets; they win over those in it."""
    _origins: dict[_Path, str] = pydantic.PrivateAttr(default_factory=dict)

    def __init_subclass__(cls, *, package: str = "", **kwargs: Any) -> None:  # noqa: ANN401 - pydantic's
        super().__init_subclass__(**kwargs)
        if package:
            cls.package = package
        if not cls.package.isidentifier() or cls.package != cls.package.lower():
            raise ConfigError(
                f"{cls.__name__} needs a section name in lower case: "
                f'class {cls.__name__}(Settings, package="kv_transfer")'
            )

    def __init__(self, **values: object) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as e:
            raise ConfigError(_explain(type(self), e, {})) from None
        self._origins = {path: "argument" for path, _ in _leaves(type(self), values)}

    @classmethod
    def env_prefix(cls) -> str:
        """Start of this package's environment variables."""
        return f"{ENV_PREFIX}{cls.package.upper()}_"

    @classmethod
    def load(
        cls,
        environ: Mapping[str, str] | None = None,
        config_file: str | os.PathLike[str] | None = None,
        **overrides: object,
    ) -> Self:
        """The settings as arguments, environment, file and defaults give them together.

        Args:
            environ: Environment variables; None takes the process's.
            config_file: YAML file; None takes the one that `SAGELLM_COMM_CONFIG` names, if any.
            **overrides: Values of fields; they win over everything else.

        Raises:
            ConfigError: A key or variable is unknown, a value cannot be what it should be, or the
                file cannot be read. The message names value, field, origin and next step.

        """
        environ = os.environ if environ is None else environ
        path, document = _read_file(environ, config_file)
        values, origins = _merge(cls, environ, path, document.get(cls.package), overrides)
        settings = cls.__new__(cls)
        try:
            pydantic.BaseModel.__init__(settings, **values)
        except pydantic.ValidationError as e:
            raise ConfigError(_explain(cls, e, origins)) from None
        settings._origins = origins
        return settings

    def origin(self, field: str) -> str:
        """Where the value of a field comes from; `a.b` names a field of a nested section.

        Returns `argument`, `environment <VARIABLE>`, `file <path>` or `default`. A section that
        has parts from several places names them all.

        Raises:
            ConfigError: There is no such field.

        """
        path = tuple(field.split("."))
        known = [".".join(p) for p in _field_paths(type(self))]
        if path[0] not in type(self).model_fields:
            raise ConfigError(f"{self.package} has no field {field!r}{_nearest(field, known)}")
        for length in range(len(path), 0, -1):
            if path[:length] in self._origins:
                return self._origins[path[:length]]
        below = {o for p, o in self._origins.items() if p[: len(path)] == path}
        return ", ".join(sorted(below)) or "default"

    def describe(self) -> str:
        """Every field with its value and origin, one line each."""
        lines = []
        for path in _field_paths(type(self)):
            value: object = self
            for name in path:
                value = getattr(value, name)
            lines.append(
                f"{self.package}.{'.'.join(path)} = {value!r} ({self.origin('.'.join(path))})"
            )
        return "\n".join(lines)


def load_all(
    environ: Mapping[str, str] | None = None,
    config_file: str | os.PathLike[str] | None = None,
) -> dict[str, Settings]:
    """The settings of every installed package, by section, all of them validated.

    Sections and variables of a package of this family that is not installed are left alone, so
    that one file can serve machines with different parts.

    Raises:
        ConfigError: Anything that `Settings.load` refuses, for any package, in one message; a
            section or variable that belongs to no package, with the nearest one.

    """
    from .observe import ObserveSettings
    from .ports import PortSettings
    from .registry import Registry
    from .selection import SelectionSettings

    environ = os.environ if environ is None else environ
    classes: dict[str, type[Settings]] = {
        cls.package: cls for cls in (ObserveSettings, PortSettings, SelectionSettings)
    }
    registry: Registry[type[Settings]] = Registry(SETTINGS_GROUP)
    for name, found in registry.load_all().items():
        if found.package != name:
            raise ConfigError(
                f"entry point {name!r} of {SETTINGS_GROUP} gives settings of section "
                f"{found.package!r}; the two names must be equal"
            )
        classes[name] = found
    path, document = _read_file(environ, config_file)
    sections = sorted({*classes, *_DISTRIBUTIONS})
    problems = [
        f"{path} has an unknown section {key!r}{_nearest(str(key), sections)}"
        for key in document
        if key not in sections
    ]
    prefixes = tuple(f"{ENV_PREFIX}{s.upper()}_" for s in sections)
    named = {CONFIG_VARIABLE, *(v for c in classes.values() for v in c.env_names)}
    for variable in sorted(environ):
        if variable.startswith(ENV_PREFIX) and variable not in named:
            if not variable.startswith(prefixes):
                known = [*named, *(v for c in classes.values() for v in _variables(c))]
                problems.append(f"unknown variable {variable}{_nearest(variable, known)}")
    loaded: dict[str, Settings] = {}
    for name, cls in sorted(classes.items()):
        try:
            loaded[name] = cls.load(environ, config_file)
        except ConfigError as e:
            problems.append(str(e))
    if problems:
        raise ConfigError("; ".join(problems))
    return loaded


# -- reading ------------------------------------------------------------------------------


def _read_file(
    environ: Mapping[str, str], config_file: str | os.PathLike[str] | None
) -> tuple[str, dict[str, Any]]:
    """Path and content of the YAML file; an empty path when there is none."""
    named = config_file if config_file is not None else environ.get(CONFIG_VARIABLE)
    if not named:
        return "", {}
    path = os.fspath(named)
    asked = "config_file" if config_file is not None else CONFIG_VARIABLE
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(
            f"cannot read {path} ({asked}): {e.strerror}; correct or unset {asked}"
        ) from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} ({asked}) is not YAML: {' '.join(str(e).split())}") from None
    if document is None:
        return path, {}
    if not isinstance(document, dict):
        raise ConfigError(
            f"{path} ({asked}) holds a {type(document).__name__}; it must map a package's name "
            "to its settings, as in `ports: {range: 30000-30100}`"
        )
    return path, document


@dataclass(frozen=True, slots=True)
class _Layer:
    """Values of one source, with the origin that each path is given."""

    values: list[tuple[_Path, Any]]
    origins: dict[_Path, str]


def _merge(
    cls: type[Settings],
    environ: Mapping[str, str],
    path: str,
    section: object,
    overrides: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[_Path, str]]:
    """One nested mapping of all sources, and the origin of each of its leaves."""
    if section is not None and not isinstance(section, dict):
        raise ConfigError(
            f"section {cls.package!r} of {path} is {section!r}; it must map fields to values"
        )
    file_leaves = list(_leaves(cls, section or {}))
    argument_leaves = list(_leaves(cls, overrides))
    layers = [
        _Layer(file_leaves, {p: f"file {path}" for p, _ in file_leaves}),
        _from_environ(cls, environ),
        _Layer(argument_leaves, {p: "argument" for p, _ in argument_leaves}),
    ]
    flat: dict[_Path, Any] = {}
    origins: dict[_Path, str] = {}
    for layer in layers:
        for leaf, value in layer.values:
            for other in [o for o in flat if o[: len(leaf)] == leaf or leaf[: len(o)] == o]:
                del flat[other], origins[other]
            flat[leaf], origins[leaf] = value, layer.origins[leaf]
    nested: dict[str, Any] = {}
    for leaf, value in flat.items():
        at = nested
        for name in leaf[:-1]:
            at = at.setdefault(name, {})
        at[leaf[-1]] = value
    return nested, origins


def _from_environ(cls: type[Settings], environ: Mapping[str, str]) -> _Layer:
    layer = _Layer([], {})
    prefix = cls.env_prefix()
    # A variable with a name of its own comes last, so that its value stays.
    for variable in sorted(environ, key=lambda v: (v in cls.env_names, v)):
        if variable in cls.env_names:
            path: _Path = (cls.env_names[variable],)
        elif variable.startswith(prefix):
            path = tuple(variable[len(prefix) :].lower().split("__"))
        else:
            continue
        annotation, raw = _declared(cls, path)
        if annotation is None:
            raise ConfigError(f"unknown variable {variable}{_nearest(variable, _variables(cls))}")
        text = environ[variable]
        value = text if raw else _parse(text, annotation, variable)
        for rest, leaf in _leaves_of(annotation, value):
            layer.values.append((path + rest, leaf))
            layer.origins[path + rest] = f"environment {variable}"
    return layer


def _parse(text: str, annotation: object, variable: str) -> object:
    """A variable's text as the field wants it; pydantic turns plain words into numbers."""
    kinds = _alternatives(annotation)
    if text == "null" and type(None) in kinds:
        return None
    bare = [get_origin(k) or k for k in kinds]
    if text[:1] in ("[", "{") and str not in bare:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise ConfigError(
                f"{variable}={text!r} is not YAML: {' '.join(str(e).split())}"
            ) from None
    if any(k in (list, tuple, set, frozenset) for k in bare) and str not in bare:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


# -- the shape of a settings class --------------------------------------------------------


def _alternatives(annotation: object) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _model_of(annotation: object) -> type[pydantic.BaseModel] | None:
    for kind in _alternatives(annotation):
        if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
            return kind
    return None


def _declared(cls: type[pydantic.BaseModel], path: _Path) -> tuple[object, bool]:
    """What a path of field names is declared as, None when there is no such path.

    The second value says that the field has a validator of its own for text.
    """
    field = cls.model_fields.get(path[0])
    if field is None:
        return None, False
    annotation = field.annotation
    if len(path) == 1:
        return annotation, any(isinstance(m, pydantic.BeforeValidator) for m in field.metadata)
    model = _model_of(annotation)
    if model is not None:
        return _declared(model, path[1:])
    for kind in _alternatives(annotation):
        if get_origin(kind) in (dict, Mapping) and len(path) == 2:
            return get_args(kind)[1], False
    return None, False


def _leaves(
    cls: type[pydantic.BaseModel], values: Mapping[Any, Any]
) -> Iterator[tuple[_Path, Any]]:
    """Paths and values, going down into nested sections that are given as mappings."""
    for key, value in values.items():
        field = cls.model_fields.get(key) if isinstance(key, str) else None
        annotation = field.annotation if field else None
        for rest, leaf in _leaves_of(annotation, value):
            yield (str(key), *rest), leaf


def _leaves_of(annotation: object, value: object) -> Iterator[tuple[_Path, Any]]:
    model = _model_of(annotation)
    if model is not None and isinstance(value, Mapping) and value:
        yield from _leaves(model, value)
    elif isinstance(value, Mapping) and value and _annotated_dict(annotation):
        for key, item in value.items():
            yield (str(key),), item
    else:
        yield (), value


def _annotated_dict(annotation: object) -> bool:
    return any(get_origin(k) in (dict, Mapping) for k in _alternatives(annotation))


def _field_paths(cls: type[pydantic.BaseModel]) -> Iterator[_Path]:
    for name, field in cls.model_fields.items():
        model = _model_of(field.annotation)
        if model is None or type(None) in _alternatives(field.annotation):
            yield (name,)
        else:
            yield from ((name, *rest) for rest in _field_paths(model))


def _variables(cls: type[Settings]) -> list[str]:
    return [cls.env_prefix() + "__".join(p).upper() for p in _field_paths(cls)]


# -- saying what is wrong -----------------------------------------------------------------


def _nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    return f"{guess}; known: {', '.join(known) or 'none'}"


def _is_secret(cls: type[Settings], path: _Path) -> bool:
    declared = [_declared(cls, path[:n])[0] for n in range(1, len(path) + 1)]
    secret = (pydantic.SecretStr, pydantic.SecretBytes)
    return any(k in secret for d in declared for k in _alternatives(d))


def _explain(
    cls: type[Settings], error: pydantic.ValidationError, origins: Mapping[_Path, str]
) -> str:
    """Each thing that pydantic refused: value, field, origin, reason, next step."""
    sentences = []
    for item in error.errors(include_url=False, include_context=False):
        path = tuple(str(part) for part in item["loc"])
        found = next(
            (origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), "argument"
        )
        name = ".".join((cls.package, *path)) if path else cls.package
        if item["type"] == "extra_forbidden":
            known = [".".join(p) for p in _field_paths(cls)]
            sentences.append(f"unknown field {name} ({found}){_nearest('.'.join(path), known)}")
            continue
        step = {
            "environment": f"correct or unset {found.removeprefix('environment ')}",
            "file": f"correct {name.replace('.', ' > ')} in {found.removeprefix('file ')}",
        }.get(found.split(" ")[0], "pass another value")
        reason = item["msg"].removeprefix("Value error, ")
        shown = "**********" if _is_secret(cls, path) else repr(item["input"])
        sentences.append(f"{name} = {shown} ({found}): {reason}; {step}")
    return "; ".join(sentences)
