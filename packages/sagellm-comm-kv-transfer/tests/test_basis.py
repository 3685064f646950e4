"""Bases: where they are kept, and those that somebody has made up."""

import json
import random
import struct
import threading

import numpy as np
import pytest
from basis_data import fitted

from sagellm.comm.kv_transfer.compression.basis import Basis
from sagellm.comm.kv_transfer.compression.basis_store import BasisStore
from sagellm.core.protocols import CommError, ConfigError, IntegrityError, ResourceError


def test_the_store_is_bounded_and_checks():
    basis = fitted()
    store = BasisStore(max_bytes=len(basis.data) + 100)

    assert store.put(basis.data) == store.put(basis) == basis.fingerprint
    assert basis.fingerprint in store
    assert len(store) == 1
    assert store.data(basis.fingerprint) == basis.data
    with pytest.raises(ResourceError, match="beside"):
        store.put(fitted(model="n"))
    with pytest.raises(ResourceError, match="the store takes"):
        store.put(bytes(len(basis.data) + 200))
    store.drop(basis.fingerprint)
    store.put(fitted(model="n"))
    with pytest.raises(ConfigError, match="the sender gives it"):
        store.get(basis.fingerprint)


def test_many_threads_fill_one_store():
    made = [fitted(model=str(i)) for i in range(4)]
    store, errors = BasisStore(), []

    def work(i):
        try:
            for basis in made[i % 4 :] + made[: i % 4]:
                assert store.get(store.put(basis.data)).info == basis.info
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert not errors
    assert len(store) == 4


def with_info(data, **changes):
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    info = {**json.loads(header["__metadata__"]["basis"]), **changes}
    header["__metadata__"]["basis"] = json.dumps(info, separators=(",", ":"))
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return struct.pack("<Q", len(body)) + body + data[8 + length :]


@pytest.mark.parametrize(
    "changes",
    [{"layers": 8}, {"heads": 1 << 40}, {"join": 0}, {"join": 3}, {"dim": -16}, {"version": 2},
     {"inv_freq": [1e9]}, {"inv_freq": [1.0] * 99}, {"model": "x" * 999}, {"extra": 1},
     {"layers": "many"}],
    ids=str,
)  # fmt: skip
def test_headers_that_lie_are_refused(bases, changes):
    with pytest.raises(IntegrityError):
        Basis(with_info(bases[1].data, **changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [("mean", np.nan), ("mean", 1e30), ("weight", 0.0), ("weight", -1.0), ("weight", np.inf),
     ("deviation", -1.0), ("deviation", 1e30), ("matrix", np.nan), ("matrix", 2.0),
     ("matrix", 0.5)],
)  # fmt: skip
def test_values_that_no_basis_has_are_refused(bases, field, value):
    data = bytearray(bases[1].data)
    (length,) = struct.unpack_from("<Q", data)
    entry = json.loads(data[8 : 8 + length])[f"v.2.{field}"]
    dtype = "<f2" if field == "matrix" else "<f4"
    values = np.frombuffer(data, dtype, 8, 8 + length + entry["data_offsets"][0])
    values[4] = value

    with pytest.raises(IntegrityError, match="basis"):
        Basis(bytes(data))


def test_no_mutant_of_a_basis_crashes_or_fills_memory(bases):
    source, data = random.Random(3), bases[1].data
    (length,) = struct.unpack_from("<Q", data)
    taken = 0
    for _ in range(600):
        changed = bytearray(data)
        at = source.randrange(len(data) if source.random() < 0.3 else length + 8)
        match source.randrange(4):
            case 0:
                changed[at] ^= 1 << source.randrange(8)
            case 1:
                del changed[at : at + source.randrange(1, 60)]
            case 2:
                changed[at:at] = source.randbytes(source.randrange(1, 9))
            case 3:
                changed[at : at + 4] = b"\xff\xff\xff\x7f"
        try:
            basis = Basis(bytes(changed))
        except CommError:
            continue
        taken += 1  # a value that could be one; its fingerprint tells
        assert basis.fingerprint != bases[1].fingerprint or changed == data
    assert taken < 200
