"""Reads slices of tensors out of a Hugging Face checkpoint, and nothing beside them."""

from __future__ import annotations

import hashlib
import json
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from sagellm.core.protocols import ConfigError, IntegrityError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = ("BF16", "F16", "F32", "F64")
_SAMPLE_BYTES = 1024


class Checkpoint:
    """An open checkpoint, one safetensors file or several under an index.

    Files are mapped, not loaded: `read` touches the bytes of the slice asked for. Not safe to
    share between threads; close it, or use it as a context manager.

    Attributes:
        bytes_read: Bytes of tensor data handed out so far, in the file's own dtype.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        """Finds the files of a checkpoint.

        Raises:
            ConfigError: The folder has neither `model.safetensors` nor its index.
            IntegrityError: A file is truncated or is not what its name says.
        """
        self.folder = Path(checkpoint_dir)
        self.bytes_read = 0
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}  # Any: safetensors does not export the type of its handle
        self._names: dict[Path, frozenset[str]] = {}
        self._file_of: dict[str, Path] | None = None
        self._source = self.folder / SINGLE
        if not self._source.is_file():
            self._source = self.folder / INDEX
            if not self._source.is_file():
                raise ConfigError(f"{self.folder} has neither {SINGLE} nor {INDEX}")
            self._file_of = _read_index(self._source)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the files; tensors already read stay valid."""
        self._open.clear()
        self._stack.close()

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        rows: range | None = None,
        columns: range | None = None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Returns rows, columns or all of a tensor as a new contiguous tensor on the CPU.

        Args:
            name: Name in the checkpoint, as `model.norm.weight`.
            shape: Shape the whole tensor must have.
            rows: Range of the first axis; None takes all of it.
            columns: Range of the second axis; None takes all of it.
            dtype: Dtype of the result; the file may store another float.

        Raises:
            IntegrityError: The tensor is missing, has another shape, or its file is damaged.
            ConfigError: The tensor is not stored as floats (a quantised checkpoint).
        """
        path = self._path(name)
        handle = self._handle(path)
        if name not in self._names[path]:
            raise IntegrityError(f"tensor {name!r} is missing from {path}")
        try:
            whole = handle.get_slice(name)
            found, stored = tuple(whole.get_shape()), whole.get_dtype()
            if found != shape:
                raise IntegrityError(
                    f"tensor {name!r} in {path} has shape {found}; the configuration says {shape}"
                )
            if stored not in _FLOATS:
                raise ConfigError(
                    f"tensor {name!r} in {path} is stored as {stored}; LlamaTP reads "
                    f"{', '.join(_FLOATS)}"
                )
            if rows is not None and len(rows) == 0:
                return torch.empty((0, *shape[1:]), dtype=dtype)
            if columns is not None:
                part = whole[_as_slice(rows), _as_slice(columns)]
            else:
                part = whole[_as_slice(rows)]
        except SafetensorError as e:
            raise IntegrityError(f"cannot read tensor {name!r} from {path}: {e}") from e
        tensor: torch.Tensor = part
        self.bytes_read += tensor.nbytes
        # a copy always, so that nothing refers to the mapping after close()
        return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def fingerprint(self) -> str:
        """Returns a hash of every tensor's name, dtype, shape, first and last bytes.

        Cheap, because it reads two small samples of each tensor, and equal however the tensors
        are spread over files. It tells checkpoints apart; it does not prove them untouched.

        Raises:
            IntegrityError: A file is missing, truncated or damaged.
        """
        digest = hashlib.sha256()
        sources = {self._source} if self._file_of is None else set(self._file_of.values())
        for _, sample in sorted(s for path in sources for s in self._samples(path)):
            digest.update(sample)
        return digest.hexdigest()

    def _samples(self, path: Path) -> list[tuple[str, bytes]]:
        self._handle(path)  # safetensors has checked the header and the offsets
        samples = []
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            for name, tensor in header.items():
                if name == "__metadata__" or (self._file_of and self._file_of.get(name) != path):
                    continue
                first, stop = tensor["data_offsets"]
                count = min(_SAMPLE_BYTES, stop - first)
                what = json.dumps([name, tensor["dtype"], tensor["shape"]]).encode()
                for start in (first, stop - count):
                    file.seek(8 + length + start)
                    what += file.read(count)
                samples.append((name, what))
        return samples

    def _path(self, name: str) -> Path:
        if self._file_of is None:
            return self._source
        if name not in self._file_of:
            raise IntegrityError(f"tensor {name!r} is missing from {self._source}")
        return self._file_of[name]

    def _handle(self, path: Path) -> Any:  # noqa: ANN401 (see _open)
        if path not in self._open:
            try:
                handle = self._stack.enter_context(safe_open(path, framework="pt"))
                self._names[path] = frozenset(handle.keys())
            except (SafetensorError, OSError) as e:
                raise IntegrityError(f"{path} is missing, truncated or damaged: {e}") from e
            self._open[path] = handle
        return self._open[path]


def _as_slice(part: range | None) -> slice:
    return slice(None) if part is None else slice(part.start, part.stop)


def _read_index(path: Path) -> dict[str, Path]:
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        raise IntegrityError(f"{path} is not readable JSON: {e}") from e
    weights = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weights, dict):
        raise IntegrityError(f"{path} has no weight_map object")
    files: dict[str, Path] = {}
    for name, file in weights.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise IntegrityError(f"{path}: {name!r} lies in {file!r}, which is no plain file name")
        files[name] = path.parent / file
    return files
