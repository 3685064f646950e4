"""The package as a whole: what importing it costs, what it lists, and who else defines what."""

import ast
import gc
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sagellm.core.protocols as protocols
from sagellm.core.protocols import errors, metrics

PACKAGE = Path(protocols.__file__).parent
REPOSITORY = PACKAGE.parents[4]


def python(code, **environ):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=60, env={**os.environ, **environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_neither_torch_nor_numpy_nor_what_extras_bring():
    loaded = python(
        "import sys, sagellm.core.protocols, sagellm.core.protocols.bench,"
        " sagellm.core.protocols.config, sagellm.core.protocols.doctor,"
        " sagellm.core.protocols.metrics, sagellm.core.protocols.ports,"
        " sagellm.core.protocols.registry, sagellm.core.protocols.testing\n"
        "print([m for m in ('torch', 'numpy', 'prometheus_client', 'opentelemetry', 'pytest')"
        " if m in sys.modules])"
    )

    assert loaded.strip() == "[]"


def test_importing_reads_no_environment_and_opens_no_socket():
    python(
        "import os, socket, sys\n"
        "import yaml, pydantic, importlib.metadata, subprocess, argparse, tempfile\n"
        "import multiprocessing.connection\n"
        "def audit(event, args):\n"
        "    if event.startswith(('socket.', 'subprocess.')):\n"
        "        raise SystemExit(f'{event} {args}')\n"
        "sys.addaudithook(audit)\n"
        "class Watched(dict):\n"
        "    def get(self, key, default=None):\n"
        "        assert not str(key).startswith('SAGELLM'), key\n"
        "        return default\n"
        "    __getitem__ = get\n"
        "os.environ = Watched()\n"
        "import sagellm.core.protocols, sagellm.core.protocols.config\n"
        "import sagellm.core.protocols.ports, sagellm.core.protocols.bench\n",
        SAGELLM_COMM_PORTS_RANGE="rubbish",
    )


@pytest.mark.parametrize(
    "name",
    ["", ".bench", ".config", ".doctor", ".errors", ".metrics", ".ports", ".registry", ".testing"],
)
def test_all_lists_what_is_there_once_and_sorted(name):
    module = importlib.import_module("sagellm.core.protocols" + name)

    assert len(set(module.__all__)) == len(module.__all__)
    assert [n for n in module.__all__ if not hasattr(module, n)] == []


def test_every_module_can_be_imported():
    for module in pkgutil.walk_packages([str(PACKAGE)], "sagellm.core.protocols."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


# -- strays -------------------------------------------------------------------------------


def foreign_sources():
    return sorted((REPOSITORY / "packages").glob("*/src/**/*.py"))


def parsed(source):
    """A tree; before 3.11.9, finalisers that run in its making break it (python/cpython#106905)."""
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        gc.enable()


def strings(source):
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_errors_with_codes_are_defined_here_only():
    strays = []
    for file in foreign_sources():
        for node in ast.walk(parsed(file.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(b).split(".")[-1] for b in node.bases}
                assigned = {
                    t.id
                    for a in node.body
                    if isinstance(a, ast.Assign)
                    for t in a.targets
                    if isinstance(t, ast.Name)
                }
                if "code" in assigned and bases & set(errors.__all__):
                    strays.append(f"{file.name}: {node.name}")
    assert strays == []


def test_shared_metric_names_are_written_here_only():
    shared = {m.name for m in metrics.ALL_METRICS}
    strays = [
        f"{file.name}: {text}"
        for file in foreign_sources()
        for text in strings(file.read_text())
        if text in shared
    ]
    assert strays == []


def test_no_package_reads_its_variables_past_the_settings():
    strays = [
        f"{file.name}: {line.strip()}"
        for file in foreign_sources()
        for line in file.read_text().splitlines()
        if re.search(r"(environ|getenv)\b.*SAGELLM_COMM_", line)
    ]
    assert strays == []


def test_no_port_is_written_into_code():
    strays = []
    for file in [*foreign_sources(), *PACKAGE.rglob("*.py")]:
        for node in ast.walk(parsed(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg in ("port", "master_port"):
                value = node.value
                if isinstance(value, ast.Constant) and isinstance(value.value, int) and value.value:
                    strays.append(f"{file.name}:{value.lineno} port={value.value}")
    assert strays == []


def test_error_codes_are_unique_and_builtin_too():
    classes = [getattr(errors, n) for n in errors.__all__ if n.endswith("Error")]
    codes = [c.code for c in classes]

    assert len(set(codes)) == len(codes)
    for cls in classes:
        assert issubclass(cls, errors.CommError)
        if cls is not errors.CommError:
            assert any(b.__module__ == "builtins" for b in cls.__mro__[1:-3])
            assert isinstance(errors.error_from_code(cls.code, "text"), cls)
