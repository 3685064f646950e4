"""What a process of a `RankPool` runs, and how jobs are put into bytes.

Only a parent and the children it started talk in this way, over descriptors that nobody else
has; nothing here is ever read from a network.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import io
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from sagellm.core.protocols.errors import ConfigError

__all__ = ["dump_job", "dumps", "loads", "run"]

_PARENT_MAIN = "__sagellm_parent_main__"
"""What the parent's `__main__` is called in a worker."""


def dumps(value: object) -> bytes:
    """A value as bytes."""
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


class _Unpickler(pickle.Unpickler):
    """Finds modules that were loaded by file, whatever their names look like."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - as pickle's own
        if module == _PARENT_MAIN and module not in sys.modules:
            module = "__main__"
        elif module == "__main__" and _PARENT_MAIN in sys.modules:
            module = _PARENT_MAIN
        if module in sys.modules:
            found: Any = sys.modules[module]
            for part in name.split("."):
                found = getattr(found, part)
            return found
        return super().find_class(module, name)


def loads(data: bytes) -> Any:  # noqa: ANN401 - whatever was put in
    """The value that `dumps` made bytes of."""
    return _Unpickler(io.BytesIO(data)).load()


class _Pickler(pickle.Pickler):
    """Notes the modules whose functions and classes a worker will have to find."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.modules: dict[str, str] = {}

    def reducer_override(self, obj: Any) -> Any:  # noqa: ANN401 - as pickle's own
        if isinstance(obj, type | FunctionType):
            self._note(obj.__module__)
        return NotImplemented

    def _note(self, name: str) -> None:
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None) or ""
        if name == "__main__":
            spec = getattr(module, "__spec__", None)
            self.modules[_PARENT_MAIN] = file if spec is None else f"module:{spec.name}"
        elif file:
            self.modules[name] = file


def dump_job(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[list[tuple[str, str]], bytes]:
    """The modules a worker must have first, and the pickled call.

    Raises:
        ConfigError: The function or an argument cannot be found from another process.

    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump((fn, args))
    except Exception as e:
        raise ConfigError(
            f"{getattr(fn, '__qualname__', fn)!r} or its arguments cannot be sent to another "
            f"process: {e}; use a function at the top of a module and plain values"
        ) from e
    return list(pickler.modules.items()), file.getvalue()


def _provide(name: str, file: str) -> None:
    """Have module `name` in sys.modules, imported by name or, failing that, from its file."""
    if name in sys.modules:
        return
    if file.startswith("module:"):
        sys.modules[name] = importlib.import_module(file.removeprefix("module:"))
        return
    with contextlib.suppress(ImportError, ValueError):
        found = importlib.util.find_spec(name)
        if found is not None and found.origin and os.path.samefile(found.origin, file):
            importlib.import_module(name)
            return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"module {name} cannot be loaded from {file!r}")
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _failure(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        message = dumps(("error", (text, error)))
        loads(message)
    except Exception:  # many exceptions cannot be rebuilt from their arguments
        return dumps(("error", (text, None)))
    return message


def _run_job(job: tuple[int, int, tuple[list[tuple[str, str]], bytes]]) -> bytes:
    rank, size, (modules, blob) = job
    try:
        for name, file in modules:
            _provide(name, file)
        fn, args = loads(blob)
        result = fn(rank, size, *args)
    except BaseException as e:  # whatever a rank raises is the parent's to judge
        return _failure(e)
    try:
        return dumps(("result", result))
    except Exception as e:
        return _failure(
            ConfigError(f"a result of type {type(result).__name__} cannot be sent: {e}")
        )


def _die_with_parent(fd: int) -> None:
    """End this process, even in the middle of a job, when the parent's end of a pipe closes."""
    os.read(fd, 1)
    os._exit(1)


def main(argv: list[str]) -> None:
    """Serve jobs until the parent closes the pipe."""
    from multiprocessing.connection import Connection

    pipe_fd, alive_fd, stack_path = int(argv[0]), int(argv[1]), argv[2]
    threading.Thread(target=_die_with_parent, args=(alive_fd,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stack_file = open(stack_path, "w")
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
    pipe: Connection[Any, Any] = Connection(pipe_fd)
    try:
        _, preload = loads(pipe.recv_bytes())
        for name in preload:
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name)
        pipe.send_bytes(dumps(("ready", None)))
        while True:
            _, job = loads(pipe.recv_bytes())
            pipe.send_bytes(_run_job(job))
    except (EOFError, OSError):
        return
    except Exception as e:
        pipe.send_bytes(_failure(e))


def run() -> None:
    """Serve the parent that started this process with its descriptors as arguments."""
    main(sys.argv[1:])
