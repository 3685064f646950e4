"""Where settings come from, and what is refused with which words."""

from typing import ClassVar

import pydantic
import pytest

from sagellm.core.protocols import config
from sagellm.core.protocols.config import Section, Settings, load_all
from sagellm.core.protocols.errors import ConfigError


class Tcp(Section):
    streams: int = 1
    bind: str | None = None


class Example(Settings, package="example"):
    chunk_bytes: int = pydantic.Field(default=65536, ge=1)
    codec: str = "none"
    hosts: list[str] = pydantic.Field(default_factory=list)
    window: int | None = 4
    weights: dict[str, float] = pydantic.Field(default_factory=dict)
    tcp: Tcp = Tcp()


PREFIX = "SAGELLM_COMM_EXAMPLE_"


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "sagellm.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_an_argument_beats_environment_beats_file_beats_default(file):
    path = file("example: {chunk_bytes: 1, codec: lz4, window: 2}\nother: {x: 1}\n")
    environ = {PREFIX + "CHUNK_BYTES": "2", PREFIX + "CODEC": "zstd", "SAGELLM_COMM_CONFIG": path}

    settings = Example.load(environ, chunk_bytes=3)

    assert (settings.chunk_bytes, settings.codec, settings.window) == (3, "zstd", 2)
    assert settings.origin("chunk_bytes") == "argument"
    assert settings.origin("codec") == f"environment {PREFIX}CODEC"
    assert settings.origin("window") == f"file {path}"
    assert settings.origin("hosts") == "default"


def test_nested_sections_merge_leaf_by_leaf(file):
    path = file("example: {tcp: {streams: 2, bind: here}}")

    settings = Example.load({PREFIX + "TCP__STREAMS": "8"}, path)

    assert settings.tcp == Tcp(streams=8, bind="here")
    assert settings.origin("tcp.streams") == f"environment {PREFIX}TCP__STREAMS"
    assert settings.origin("tcp.bind") == f"file {path}"
    assert settings.origin("tcp") == f"environment {PREFIX}TCP__STREAMS, file {path}"
    assert f"example.tcp.streams = 8 (environment {PREFIX}TCP__STREAMS)" in settings.describe()


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("HOSTS", "a, b", "hosts", ["a", "b"]),
        ("HOSTS", "[a, b]", "hosts", ["a", "b"]),
        ("WINDOW", "null", "window", None),
        ("WEIGHTS__FAST", "0.5", "weights", {"fast": 0.5}),
        ("TCP", "{streams: 3}", "tcp", Tcp(streams=3)),
        ("CODEC", "[x]", "codec", "[x]"),
        ("CODEC", "null", "codec", "null"),
    ],
)
def test_text_of_a_variable_becomes_what_the_field_wants(variable, text, field, value):
    assert getattr(Example.load({PREFIX + variable: text}), field) == value


@pytest.mark.parametrize(
    ("environ", "overrides", "match"),
    [
        (
            {PREFIX + "CHUNK_BYTES": "many"},
            {},
            "chunk_bytes = 'many' .environment .*or unset",
        ),
        ({PREFIX + "CHUNK_BITES": "1"}, {}, f"did you mean '{PREFIX}CHUNK_BYTES'"),
        ({PREFIX + "TCP__STREAM": "1"}, {}, f"did you mean '{PREFIX}TCP__STREAMS'"),
        ({PREFIX + "TCP__STREAMS__X": "1"}, {}, "unknown variable"),
        ({PREFIX + "TCP": "{streams"}, {}, "is not YAML"),
        ({}, {"chunk_bytes": 0}, "chunk_bytes = 0 .argument.: .*pass another value"),
        (
            {},
            {"chunk_bites": 1},
            "unknown field example.chunk_bites .argument.; did",
        ),
        ({"SAGELLM_COMM_CONFIG": "/nowhere/x.yaml"}, {}, "cannot read /nowhere/x.yaml"),
    ],
)
def test_rubbish_is_refused_with_value_origin_and_next_step(environ, overrides, match):
    with pytest.raises(ConfigError, match=match):
        Example.load(environ, **overrides)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("example: {chunk_bites: 1}", "did you mean 'chunk_bytes'"),
        (
            "example: {tcp: {streams: x}}",
            "tcp.streams = 'x' .file .*example > tcp > streams",
        ),
        ("example: 3", "must map fields to values"),
        ("[1]", "holds a list"),
        ("{", "is not YAML"),
    ],
)
def test_a_bad_file_is_refused_with_its_path(file, text, match):
    path = file(text)

    with pytest.raises(ConfigError, match=match) as caught:
        Example.load({}, path)

    assert path in str(caught.value)


def test_an_empty_file_changes_nothing(file):
    assert Example.load({}, file("")) == Example()


def test_calling_the_class_takes_arguments_only(monkeypatch):
    monkeypatch.setenv(PREFIX + "CHUNK_BYTES", "9")

    assert Example().chunk_bytes == 65536
    assert Example.load().chunk_bytes == 9
    with pytest.raises(ConfigError, match="pass another value"):
        Example(chunk_bytes="x")


def test_settings_are_frozen_and_unknown_origins_refused():
    settings = Example(codec="lz4")

    assert settings.origin("codec") == "argument"
    with pytest.raises(pydantic.ValidationError):
        settings.codec = "zstd"
    with pytest.raises(ConfigError, match="did you mean 'codec'"):
        settings.origin("codek")


def test_a_section_needs_a_name():
    with pytest.raises(ConfigError, match="section name"):
        type("Bad", (Settings,), {}, package="Not-Lower")


class FakeRegistry:
    classes: ClassVar[dict] = {"example": Example}

    def __init__(self, group):
        assert group == "sagellm.comm.settings"

    def load_all(self):
        return self.classes


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr("sagellm.core.protocols.registry.Registry", FakeRegistry)


@pytest.mark.usefixtures("installed")
def test_load_all_gives_every_section(file):
    loaded = load_all({PREFIX + "CODEC": "lz4"}, file("ports: {range: 100-200}\ntopology: {a: 1}"))

    assert loaded["example"].codec == "lz4"
    assert loaded["ports"].range == (100, 200)


@pytest.mark.usefixtures("installed")
def test_load_all_names_every_problem_at_once(file):
    environ = {"SAGELLM_COMM_EXAMPEL_CODEC": "x", PREFIX + "CHUNK_BYTES": "-1"}

    with pytest.raises(ConfigError) as caught:
        load_all(environ, file("exampel: {}"))

    text = str(caught.value)
    assert "unknown section 'exampel'; did you mean 'example'" in text
    assert f"unknown variable SAGELLM_COMM_EXAMPEL_CODEC; did you mean '{PREFIX}CODEC'" in text
    assert "example.chunk_bytes = '-1'" in text


def test_an_entry_point_under_another_name_is_refused(monkeypatch):
    monkeypatch.setattr("sagellm.core.protocols.registry.Registry", FakeRegistry)
    monkeypatch.setattr(FakeRegistry, "classes", {"sample": Example})

    with pytest.raises(ConfigError, match="the two names must be equal"):
        load_all({})


def test_the_installed_packages_agree():
    assert "ports" in config.load_all({})


class Guarded(Settings, package="guarded"):
    key: pydantic.SecretStr | None = pydantic.Field(default=None, min_length=12)


def test_a_secret_is_never_shown():
    environ = {"SAGELLM_COMM_GUARDED_KEY": "correct horse battery"}

    assert "horse" not in Guarded.load(environ).describe()
    with pytest.raises(ConfigError, match=r"guarded.key = \*+ .environment") as caught:
        Guarded.load({"SAGELLM_COMM_GUARDED_KEY": "horse"})
    assert "horse" not in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean 'SAGELLM_COMM_GUARDED_KEY'") as caught:
        Guarded.load({"SAGELLM_COMM_GUARDED_KEYS": "horse"})
    assert "horse" not in str(caught.value)
