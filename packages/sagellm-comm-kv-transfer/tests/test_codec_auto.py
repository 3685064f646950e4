"""Which codec is chosen: the cost model, speeds and rates as measured, and whole channels."""

import itertools
import json
import math

import pytest
import torch
from test_coded_transfers import SOURCE, TARGET, group, memory

from sagellm.comm.kv_transfer import (
    CodecRequest,
    KVTransferSettings,
    _coded_link,
    _link_rate,
    _links,
)
from sagellm.comm.kv_transfer._coded_link import Codecs, LinkCoding, assumed_rate
from sagellm.comm.kv_transfer._link_rate import LinkRate
from sagellm.comm.kv_transfer.compression import Coding, speeds
from sagellm.comm.kv_transfer.compression.auto import (
    Speed,
    candidates,
    choose,
    coded_seconds,
    label,
    quant_within,
)
from sagellm.comm.kv_transfer.compression.quant import BOUND
from sagellm.core.protocols import ConfigError, KVConnection, KVLayout, TransferKey

MB, GB = 1e6, 1e9
EXACT, NEAR = Speed(1.5, 0.8 * GB, 1.1 * GB), Speed(2.6, 0.6 * GB, 0.9 * GB)
SPEEDS = [(Coding("lossless"), EXACT), (Coding("quant", {"step": 0.0625}), NEAR)]


def name(found):
    return label(found[0]).partition("(")[0]


def pick(rate, present=None, workers=1, nbytes=256 << 20, speeds=SPEEDS):
    return choose(nbytes, rate, speeds, workers=workers, piece_bytes=2 << 20, present=present)


def test_the_slowest_stage_sets_the_pace():
    for rate, stage in ((10 * MB, 1 / (2.6 * 10 * MB)), (10 * GB, 1 / (0.6 * GB))):
        seconds = coded_seconds(100_000_000, rate, NEAR, workers=1, piece_bytes=1_000_000)
        assert seconds == pytest.approx(0.1 * GB * stage + 0.001 / 0.6 + 0.001 / 0.9)
    two = coded_seconds(100_000_000, 10 * GB, NEAR, workers=2, piece_bytes=1_000_000)
    assert two == pytest.approx(0.05 / 0.6 + 0.001 / 0.6 + 0.001 / 0.9)
    one = coded_seconds(1_000_000, 10 * GB, NEAR, workers=8, piece_bytes=2_000_000)
    assert one == pytest.approx(0.001 / 0.6 * 2 + 0.001 / 0.9)  # a single piece has one worker


@pytest.mark.parametrize(
    ("rate", "workers", "want"),
    [(12.5 * MB, 1, "quant"), (125 * MB, 1, "quant"), (1.25 * GB, 1, "none"),
     (math.inf, 4, "none"), (0.7 * GB, 1, "lossless"), (1.25 * GB, 8, "quant")],
)  # fmt: skip
def test_what_is_chosen_at_a_rate(rate, workers, want):
    found = pick(rate, workers=workers)

    assert name(found) == want
    assert "none" in found[1]
    assert "quant(step=0.0625)" in found[1]


def test_the_choice_does_not_flutter():
    at = 0.58 * GB  # raw and coded take about the same time
    quant = SPEEDS[1:]
    assert name(pick(at, present=None, speeds=quant)) == "none"
    assert name(pick(at, present=quant[0][0], speeds=quant)) == "quant"
    assert name(pick(at / 2, present=None, speeds=quant)) == "quant"
    assert name(pick(at * 2, present=quant[0][0], speeds=quant)) == "none"


def test_what_may_be_used_within_an_error():
    assert [c.name for c in candidates("lossless")] == ["lossless-fast", "lossless"]
    for error, bound in (("near", 1 / 32), (0.25, 0.25)):
        (*exact, quant) = candidates(error)
        assert (*exact,) == candidates("lossless")
        assert quant == quant_within(bound)
        assert quant.options["per_channel"]
        assert quant.options["step"] * quant.options["v"] * BOUND <= bound
    for wrong in ("exact", 0.0, -1.0, 100.0, float("nan"), True):
        with pytest.raises(ConfigError):
            candidates(wrong)


# -- speeds of this host ---------------------------------------------------------------------


def test_speeds_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    coding = Coding("quant", {"step": 0.5})
    first = speeds.CodecSpeeds()
    assert first.get(coding, "bfloat16") is None

    found = first.learn(coding, "bfloat16")

    assert found.ratio > 3
    assert found.encode_bytes_per_s > 1e6 < found.decode_bytes_per_s
    monkeypatch.setattr(speeds, "measure", lambda *_: pytest.fail("measured again"))
    assert speeds.CodecSpeeds().learn(coding, "bfloat16") == found
    assert speeds.CodecSpeeds().get(coding, "float16") is None
    assert [p.name for p in speeds.cache_path().parent.iterdir()] == [speeds.cache_path().name]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"lossless bfloat16": [1, 2]}', '{"lossless bfloat16": [1, -2, "x"]}']
)
def test_a_spoilt_file_is_measured_anew(tmp_path, monkeypatch, text):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(speeds, "measure", lambda *_: EXACT)
    speeds.cache_path().parent.mkdir(parents=True)
    speeds.cache_path().write_text(text)

    assert speeds.CodecSpeeds().get(Coding("lossless"), "bfloat16") is None
    assert speeds.CodecSpeeds().learn(Coding("lossless"), "bfloat16") == EXACT
    assert json.loads(speeds.cache_path().read_text()) == {
        "lossless bfloat16": [1.5, 0.8 * GB, 1.1 * GB]
    }


def test_a_home_that_cannot_be_written_to_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(speeds, "measure", lambda *_: EXACT)

    assert speeds.CodecSpeeds().learn(Coding("lossless"), "bfloat16") == EXACT


# -- the rate of a link ----------------------------------------------------------------------


class Clocked(KVConnection):
    """A connection whose clock a test turns."""

    def __init__(self):
        self.acked, self.busy_s = 0, 0.0

    def clock(self):
        return self.acked, self.busy_s

    def send(self, views, deadline_s): ...

    def receive(self, views, deadline_s): ...

    def abort(self): ...

    def close(self): ...


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when a test says so."""

    class Time:
        now = 100.0

        def monotonic(self):
            return self.now

    made = Time()
    monkeypatch.setattr(_link_rate, "time", made)
    return made


def drive(rate, clock, bytes_per_s, *, busy=1.0, lanes=2, seconds=1.0, link=None):
    """Frames of 1 MiB over two lanes; the link is busy for part of the time."""
    if link is None:
        link = [Clocked() for _ in range(lanes)]
    piece = 1 << 20
    step = piece / bytes_per_s
    for i in range(max(4, int(seconds / step))):
        clock.now += step
        conn = link[i % len(link)]
        conn.acked += piece
        for each in link:
            each.busy_s += step * busy
        rate.sent(conn, piece, step)
    return link


def test_a_link_that_is_always_busy_has_the_rate_of_its_bytes(clock):
    rate = LinkRate(1 * GB)
    assert (rate.bytes_per_s, rate.measured) == (1 * GB, False)

    link = drive(rate, clock, 12.5 * MB, seconds=5)
    assert rate.bytes_per_s == pytest.approx(12.5 * MB, rel=0.1)
    assert rate.measured

    drive(rate, clock, 125 * MB, seconds=2, link=link)
    assert rate.bytes_per_s == pytest.approx(125 * MB, rel=0.1)


def test_a_link_that_waits_for_the_codec_is_faster_than_its_bytes(clock):
    rate = LinkRate(1 * GB)
    drive(rate, clock, 100 * MB, busy=0.1, lanes=1, seconds=2)

    assert rate.bytes_per_s == pytest.approx(1000 * MB, rel=0.1)


def test_a_known_rate_is_not_lowered_by_a_slow_codec(clock):
    rate = LinkRate(1 * GB)
    link = drive(rate, clock, 500 * MB, seconds=2, lanes=1)
    drive(rate, clock, 50 * MB, busy=0.5, seconds=2, link=link)

    assert rate.bytes_per_s == pytest.approx(500 * MB, rel=0.1)


def test_links_are_assumed_to_be_a_network_s_or_this_host_s():
    assert assumed_rate("10.0.0.1:80") < 1 * GB < assumed_rate("127.0.0.1:80")
    assert assumed_rate("[::1]:80") == assumed_rate("localhost:1") == assumed_rate("127.9.9.9:1")


# -- the choice on a link --------------------------------------------------------------------


class Table:
    """Speeds that a test knows."""

    def __init__(self, **by_name):
        self.by_name = by_name

    def get(self, coding, dtype):
        return self.by_name.get(coding.name)

    def learn(self, coding, dtype):
        return self.by_name.setdefault(coding.name, EXACT)


@pytest.fixture
def coding(monkeypatch):
    """Makes the choices of one link, whose rate a test sets."""
    monkeypatch.setattr(_coded_link, "_LOOK_S", 0.0)
    made = []

    def make(rate=125 * MB, theirs=None, table=None):
        codecs = Codecs("kv-test-codec", 1, 1 << 20)
        codecs.speeds = table or Table(**{"lossless": EXACT, "lossless-fast": EXACT, "quant": NEAR})
        made.append(codecs)
        return LinkCoding(codecs, 1, codecs.versions if theirs is None else theirs, rate)

    yield make
    for codecs in made:
        codecs.close()


def ask(link, max_error="near", nbytes=256 << 20):
    request = CodecRequest("auto", max_error=max_error)
    return link.choose(request, request.allowed(), "bfloat16", nbytes)


def test_the_choice_follows_the_rate_of_the_link(coding):
    link = coding()
    seen = []
    for rate in (12.5 * MB, 125 * MB, 10 * GB, 4 * GB, 125 * MB):
        link.rate.assumed = rate
        seen.append(label(ask(link).coding).partition("(")[0])

    assert seen == ["quant", "quant", "none", "none", "quant"]
    assert "link 125 MB/s" in link.explain()
    assert "assumed" in link.explain()
    assert "int8" in link.explain()
    ask(link, "lossless")
    assert "int8" not in link.explain()


def test_memory_that_is_read_in_place_is_never_coded(coding):
    table = Table()
    link = coding(1.0, table=table)
    link.in_place = True

    assert ask(link).coding is None
    assert "in place" in link.explain()
    assert not table.by_name  # nor does it cost the measuring of a codec
    assert not link.codecs._asked


def test_what_the_peer_lacks_is_not_considered(coding):
    link = coding(12.5 * MB)
    theirs = {n: v for n, v in link.codecs.versions.items() if n != "quant"}
    link = coding(12.5 * MB, theirs=theirs)

    found = ask(link)
    assert found.coding.name in ("lossless", "lossless-fast")
    assert "the peer has no quant" in found.why
    assert ask(coding(12.5 * MB, theirs={})).coding is None


def test_exact_means_exact(coding):
    assert ask(coding(1 * MB), "lossless").coding.name in ("lossless", "lossless-fast")


def test_codecs_are_measured_before_they_are_used(coding, eventually):
    table = Table()
    link = coding(1 * MB, table=table)

    assert ask(link).coding is None
    assert "being measured" in link.explain()
    eventually(lambda: len(table.by_name) == 3)
    assert ask(link).coding is not None


def test_what_real_values_shrink_to_counts(coding):
    link = coding(125 * MB)
    assert ask(link).coding.name == "quant"
    used = ask(link).coding
    for _ in range(20):
        link.coded(used, "bfloat16", 1000, 990, 1000 / NEAR.encode_bytes_per_s)

    assert ask(link).coding.name.startswith("lossless")


def test_a_machine_that_has_become_busy_codes_no_more_than_pays(coding, monkeypatch):
    link = coding(125 * MB)
    used = ask(link).coding
    assert used.name == "quant"
    link.coded(used, "bfloat16", 1_000_000, 400_000, 1.0)
    assert ask(link).coding == used  # one slow piece says little
    for _ in range(20):  # 20 times slower than when it was measured
        link.coded(used, "bfloat16", 1_000_000, 400_000, 20 * 1_000_000 / NEAR.encode_bytes_per_s)
    assert ask(link).coding is None

    monkeypatch.setattr(_coded_link, "_RECENT_S", 0.0)  # it is tried again after a while
    assert ask(link).coding == used


def test_one_fast_choice_per_size(coding):
    slow = Speed(2.0, 0.02 * GB, 0.02 * GB)
    link = coding(15 * MB, table=Table(quant=slow))

    assert ask(link, nbytes=4096).coding is None  # nothing overlaps in a single piece
    assert ask(link, nbytes=1 << 30).coding is not None


# -- whole channels --------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1 * MB, 1e12])
def test_channels_code_what_pays_and_say_why(channel, monkeypatch, rate):
    monkeypatch.setattr(_links, "assumed_rate", lambda address: rate)
    monkeypatch.setattr(_link_rate.LinkRate, "sent", lambda *_: None)
    layout = KVLayout((group(),), model="m")
    s = KVTransferSettings(transport="tcp")
    out, into = channel(settings=s), channel(settings=s)
    out._engine.codecs.speeds = Table(**{"lossless": EXACT, "lossless-fast": EXACT, "quant": NEAR})
    out.register(layout, a := memory(layout))
    into.register(layout, b := memory(layout, seed=1))

    for i, error in enumerate(("near", "lossless")):
        key = TransferKey(f"k{i}")
        got = into.receive(key, TARGET)
        sent = out.transfer(SOURCE, into.node_id, key=key, codec="auto", max_error=error)
        sent.wait(20)
        got.wait(20)
        exact = all(torch.equal(b[n][TARGET], a[n][SOURCE]) for n in b)
        coded = rate == 1 * MB
        assert exact == (error == "lossless" or not coded)
        assert (sent.metrics.wire_bytes < 0.9 * sent.metrics.bytes) == coded
        assert ("quant" in sent.metrics.codec) == (coded and error == "near")
        assert "expected none" in sent.explain()
    assert "codec auto chose" in out.explain(into.node_id)


def test_a_link_of_this_host_is_measured_and_left_alone(channel, eventually):
    layout = KVLayout((group(),), model="m")
    s = KVTransferSettings(transport="tcp")
    out, into = channel(settings=s), channel(settings=s)
    out._engine.codecs.speeds = Table(**{"lossless": EXACT, "lossless-fast": EXACT, "quant": NEAR})
    out.register(layout, memory(layout, 800))
    into.register(layout, memory(layout, 800, seed=1))
    ids = list(range(800))
    names = itertools.count()

    def measured():
        key = TransferKey(f"k{next(names)}")
        got = into.receive(key, ids)
        out.transfer(ids, into.node_id, key=key, codec="auto", max_error="near").wait(20)
        got.wait(20)
        return out._engine.links.ready(into.node_id).coding.rate.measured

    eventually(measured, 60)
    link = out._engine.links.ready(into.node_id)
    assert link.coding.rate.bytes_per_s > 50 * MB
