"""What is kept: whole batches or nothing, bounded, once, and read back from any file."""

import json
import math
import os
import threading

import pytest

from sagellm.comm.topology import _cost_kept
from sagellm.comm.topology._cost_kept import MOST_CURVES, MOST_REPEATS, MOST_SIZES
from sagellm.comm.topology._cost_profile import profile_path
from sagellm.comm.topology.cost_model import CostModel
from sagellm.core.protocols import ConfigError, CostTable, TopologyInfo

LIBRARY = "gloo torch-2.13"


def row(nbytes=4096, time_us=10.0, **more):
    return {"op": "all_reduce", "algorithm": "ring", "group_size": 4, "nbytes": nbytes,
            "time_us": time_us, **more}  # fmt: skip


def line(count=8, **more):
    return [row(4**k, 20 + 4**k * 1e-3, **more) for k in range(5, 5 + count)]


def model_of(rows=()):
    model = CostModel(TopologyInfo(fingerprint="f"))
    model.observe(rows)
    return model


def kept(model):
    return {key: {n: list(t) for n, t in knots.items()} for key, knots in model._kept.items()}


BAD = {
    "a field is missing": ({"op": "all_reduce"}, "sample 8 needs"),
    "a row is no mapping": ([1, 2], "sample 8 needs"),
    "an op nobody knows": (row() | {"op": "all_reduse"}, "known: all_reduce"),
    "an op that is no text": (row() | {"op": 3}, "op 3"),
    "an endless name": (row() | {"algorithm": "x" * 10_000}, "algorithm 'xxx"),
    "a time that is none": (row(time_us=math.nan), "time_us nan"),
    "an endless time": (row(time_us=math.inf), "time_us inf"),
    "a huge time": (row(time_us=10**400), "time_us 1000"),
    "a negative time": (row(time_us=-1.0), "time_us -1.0"),
    "a time in words": (row(time_us="5"), "time_us '5'"),
    "no bytes": (row(0), "nbytes .* not 0"),
    "half a byte": (row(1.5), "nbytes .* not 1.5"),
    "bytes that are none": (row(math.nan), "nbytes .* not nan"),
    "endless bytes": (row(math.inf), "nbytes .* not inf"),
    "more bytes than there are": (row(10**400), "nbytes must be a whole number"),
    "bytes beyond print": (row(10**5000), "thousands of digits"),
    "no ranks": (row(group_size=0), "group_size .* not 0"),
    "a yes for ranks": (row(group_size=True), "group_size .* not True"),
    "a group of one": (row(group_size=1), "from 2 .* not 1"),
    "a number for members": (row(members=5), "members are a list of device ids, not 5"),
    "no number of members": (row(members=0), "members are a list of device ids, not 0"),
    "an empty text for members": (row(members=""), "members|list of device ids"),
    "an op that cannot be looked up": (row() | {"op": ["x"]}, "op \\['x'\\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_at_the_end_teaches_nothing(case):
    bad, words = BAD[case]
    model = model_of(line())
    before = kept(model), model.freeze()

    with pytest.raises(ConfigError, match=words):
        model.observe([*line(algorithm="tree"), bad])

    assert (kept(model), model.freeze()) == before


@pytest.mark.parametrize("samples", [None, 5, 1.5, True])
def test_what_are_no_rows_is_refused_in_words(samples):
    model = model_of(line())

    with pytest.raises(ConfigError, match="list of rows"):
        model.observe(samples)
    with pytest.raises(ConfigError, match="list of rows"):
        model.drift(samples)


@pytest.mark.parametrize("library", ["", " ", None, 5, b"nccl", "nccl\0", "nccl \ud800"])
def test_a_library_without_a_name_keeps_nothing(library, tmp_path):
    model = model_of(line())

    with pytest.raises(ConfigError, match="library must be a name and version"):
        model.save(library, tmp_path)
    with pytest.raises(ConfigError, match="library must be a name and version"):
        model.load(library, tmp_path)

    assert not list(tmp_path.iterdir())


def test_repeats_sizes_and_curves_are_bounded():
    model = model_of()
    for k in range(MOST_REPEATS + 50):
        model.observe([row(4096, 10.0 + k)])
    model.observe([row(1000 + 8 * k, 5.0 + k) for k in range(3 * MOST_SIZES)])
    model.observe([row(4096, 9.0, algorithm=f"own {k}") for k in range(MOST_CURVES + 20)])
    model.observe([row(4096, 9.0, algorithm="last")])

    found = model._kept.items()

    assert len(found) == len(model._kept.curves) == MOST_CURVES
    assert found[-1][0].algorithm == "last"
    assert all(len(knots) <= MOST_SIZES for _, knots in found)
    assert ("all_reduce", "ring", 4, "") not in dict(found)


def test_of_many_sizes_the_ends_and_the_spread_stay_and_the_latest_repeats_count():
    model = model_of([row(1 << k, 10.0) for k in range(6, 30)])
    model.observe([row(4096 + 4 * k, 10.0) for k in range(2 * MOST_SIZES)])
    model.observe([row(1 << 29, 100.0 + k) for k in range(MOST_REPEATS + 5)])

    (knots,) = kept(model).values()

    assert len(knots) == MOST_SIZES
    assert {1 << k for k in (6, 7, 8, 9, 20, 25, 28, 29)} <= knots.keys()
    assert len(knots[1 << 29]) == MOST_REPEATS
    assert knots[1 << 29][-1] == 100.0 + MOST_REPEATS + 4


def test_loading_twice_changes_nothing(tmp_path):
    saved = model_of([*line(), *line(), row(4096, 11.0)])
    saved.save(LIBRARY, tmp_path)
    fresh = model_of([row(4096, 12.0)])

    counts = [saved.load(LIBRARY, tmp_path), fresh.load(LIBRARY, tmp_path)]
    once = kept(saved), kept(fresh)
    counts += [saved.load(LIBRARY, tmp_path), fresh.load(LIBRARY, tmp_path)]

    assert counts == [17] * 4
    assert (kept(saved), kept(fresh)) == once
    assert once[0] == kept(model_of([*line(), *line(), row(4096, 11.0)]))
    (knots,) = once[1].values()
    assert knots[4096][-1] == 12.0  # what is fresh counts as later than what was kept
    assert len(knots[4096]) == 4


def test_loading_into_a_full_model_twice_changes_nothing(tmp_path):
    model_of([row(64 + 8 * k, 5.0) for k in range(MOST_SIZES)]).save(LIBRARY, tmp_path)
    model = model_of([row(1 << 20, 5.0 + k) for k in range(MOST_REPEATS)])
    model.observe([row(10_000 + 8 * k, 5.0) for k in range(MOST_SIZES - 10)])

    model.load(LIBRARY, tmp_path)
    once = kept(model)
    model.load(LIBRARY, tmp_path)

    assert kept(model) == once
    assert [len(knots) for knots in once.values()] == [MOST_SIZES]


def spoiled(path, change):
    text = json.loads(path.read_text())
    change(text)
    path.write_text(json.dumps(text))


def set_knot(index, value):
    def change(text):
        text["curves"][0]["knots"][0][index] = value

    return change


def set_field(name, value):
    def change(text):
        text["curves"][0][name] = value

    return change


HOSTILE = {
    "times are no list": (set_knot(1, 5.0), "knots"),
    "no times": (set_knot(1, []), "0 times"),
    "a negative time": (set_knot(1, [-5.0]), "-5.0"),
    "no time": (set_knot(1, [0.0]), "0.0"),
    "a time in words": (set_knot(1, ["x"]), "float"),
    "too many times": (set_knot(1, [1.0] * (MOST_REPEATS + 1)), f"{MOST_REPEATS + 1} times"),
    "a negative size": (set_knot(0, -8), "-8"),
    "a huge size": (set_knot(0, 10**300), "knots|whole number"),
    "a size that is none": (set_knot(0, None), "null"),
    "a size twice": (lambda text: text["curves"][0]["knots"].append([1024, [1.0]]), "size 1024"),
    "no sizes": (set_field("knots", []), "0 sizes"),
    "an unknown op": (set_field("op", "all_reduse"), "all_reduse"),
    "an empty algorithm": (set_field("algorithm", ""), "algorithm"),
    "no ranks": (set_field("group_size", 0), "group_size"),
    "ranks that are a text": (set_field("group_size", "4"), "group_size|int"),
    "an endless shape": (set_field("shape", "x" * 1000), "1000 letters"),
    "curves are a mapping": (lambda text: text.update(curves={}), "array"),
    "endless curves": (
        lambda text: text.update(curves=text["curves"] * (MOST_CURVES + 1)), "curves",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_by_name_and_value(case, tmp_path):
    change, words = HOSTILE[case]
    path = model_of(line()).save(LIBRARY, tmp_path)
    spoiled(path, change)
    model = model_of(line(3))
    before = kept(model)

    with pytest.raises(ConfigError, match=words) as caught:
        model.load(LIBRARY, tmp_path)

    assert path.name in str(caught.value)
    assert "delete it and calibrate anew" in str(caught.value)
    assert kept(model) == before


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"NaN", b"[" * 200_000,
        b'{"fingerprint":"f","library":"gloo torch-2.13","version":2,"curves":' + b"[" * 200_000,
        b'{"fingerprint":"f","library":"gloo torch-2.13","version":2,"more":' + b"[" * 200_000,
        b'{"fingerprint":"f","library":"gloo torch-2.13","version":2,"curves":[{"op":"all_reduce",'
        b'"algorithm":"ring","group_size":4,"shape":"","members":[],"knots":[[8,[1e999]]]}]}',
        b'{"fingerprint":"f","library":"gloo torch-2.13","version":2,"curves":[{"op":"all_reduce",'
        b'"algorithm":"ring","group_size":4,"shape":"","members":[],"knots":[[8,[NaN]]]}]}',
        b'{"fingerprint":"f","library":"gloo torch-2.13","version":2,"curves":[{"op":"all_reduce",'
        b'"algorithm":"ring","group_size":4,"shape":"","members":[],"knots":[['
        + b"9" * 6000 + b",[1.0]]]}]}",
    ],
)  # fmt: skip
def test_text_that_is_no_profile_is_refused_by_name(data, tmp_path):
    path = profile_path(tmp_path, "f", LIBRARY)
    path.write_bytes(data)

    with pytest.raises(ConfigError, match=path.name):
        model_of().load(LIBRARY, tmp_path)


def test_a_folder_or_a_pipe_in_the_files_place_is_refused_at_once(tmp_path):
    path = profile_path(tmp_path, "f", LIBRARY)
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="no regular file"):
        model_of().load(LIBRARY, tmp_path)

    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match=path.name):
        model_of().load(LIBRARY, tmp_path)


def test_rows_come_in_while_others_ask(monkeypatch):
    monkeypatch.setattr(_cost_kept, "MOST_CURVES", 5)
    model, failed = model_of(line()), []

    def ask():
        try:
            for _ in range(60):
                assert model.predict("all_reduce", 1 << 12, 4, "ring").time_us > 0
                assert model.select(model.freeze(), "all_reduce", 1 << 12, 4)
        except Exception as e:  # told by the thread that started this one
            failed.append(e)

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    for k in range(200):
        model.observe(line(algorithm=("ring", "tree", "direct")[k % 3], group_size=2 + k % 5))
    for thread in asking:
        thread.join(60)

    assert failed == []


ASKED = {
    "an unknown op": (("all_reduse", 8, 4), "all_reduse"),
    "an op that cannot be looked up": ((["x"], 8, 4), "x"),
    "no op": ((None, 8, 4), "None"),
    "negative bytes": (("all_reduce", -8, 4), "-8"),
    "bytes that are none": (("all_reduce", math.nan, 4), "nan"),
    "endless bytes": (("all_reduce", math.inf, 4), "inf"),
    "half a byte": (("all_reduce", 0.5, 4), "0.5"),
    "bytes in words": (("all_reduce", "8", 4), "'8'"),
    "more bytes than there are": (("all_reduce", 1 << 60, 4), "1125899906842624"),
    "an empty group": (("all_reduce", 8, []), "at least 1 member"),
    "a group of 0": (("all_reduce", 8, 0), "size .* not 0"),
    "a group of less than 0": (("all_reduce", 8, -1), "size .* not -1"),
    "a group that is none": (("all_reduce", 8, math.nan), "size .* not nan"),
    "a group in words": (("all_reduce", 8, "g0"), "list of device ids"),
    "a yes for a group": (("all_reduce", 8, True), "size .* not True"),
}


@pytest.mark.parametrize("case", ASKED)
def test_questions_that_cannot_be_are_refused_alike_by_both_ways(case):
    (op, nbytes, group), words = ASKED[case]
    model = model_of(line())
    table = model.freeze()

    with pytest.raises(ConfigError, match=words):
        model.predict(op, nbytes, group, "ring")
    with pytest.raises(ConfigError, match=words):
        model.select(table, op, nbytes, group)


def test_a_group_of_one_and_no_bytes_have_answers():
    model = model_of([*line(), *line(algorithm="zz own")])
    table = model.freeze()

    alone, one = model.select(table, "broadcast", 1 << 20, 1)
    _, empty = model.select(table, "all_reduce", 0, 4)

    assert alone == "direct"  # the op's own first name, whatever else the table has
    assert one == model.predict("broadcast", 1 << 20, 1, "tree")
    assert (one.time_us, one.low_us, one.high_us, one.busbw_bytes_per_s) == (0, 0, 0, None)
    assert model.predict("all_reduce", 0, 4, "ring").time_us == pytest.approx(20, rel=0.1)
    assert empty.busbw_bytes_per_s is None
    assert empty.basis == "scaled"
    assert 0 < empty.low_us < empty.time_us < empty.high_us
    with pytest.raises(ConfigError, match="it has all_reduce"):
        model.select(CostTable("f", 1, {("all_reduce", "ring", 4): ((8, 1.0),)}), "p2p", 8, 2)
