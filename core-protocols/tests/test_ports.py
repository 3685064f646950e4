"""Listeners and reservations, on real sockets."""

import socket

import pytest

from sagellm.core.protocols.errors import ConfigError, ResourceError
from sagellm.core.protocols.ports import PortSettings, SagePorts

FREE = PortSettings()


@pytest.fixture
def taken():
    with SagePorts(settings=FREE).listen("other") as listener:
        yield listener.getsockname()[1]


def connect(port):
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        return True


def test_the_kernel_chooses_without_configuration():
    ports = SagePorts(settings=FREE)

    with ports.listen("a") as a, ports.listen("b") as b:
        assert a.getsockname()[0] == "127.0.0.1"
        assert a.getsockname()[1] != b.getsockname()[1]
        assert connect(a.getsockname()[1])


def test_a_range_is_used_up_and_then_refused(taken):
    ports = SagePorts((taken, taken), settings=FREE)

    with pytest.raises(
        ResourceError, match=rf"no port for store on 127.0.0.1: every port {taken}-"
    ):
        ports.listen("store")


def test_a_range_skips_what_is_in_use(taken):
    if taken == 65535:
        pytest.skip("the kernel gave the last port")
    ports = SagePorts(f"{taken}-65535", settings=FREE)

    with ports.listen("a") as a, ports.listen("b") as b:
        assert taken < a.getsockname()[1] < b.getsockname()[1]


def test_a_configured_port_in_use_names_port_name_and_setting(taken):
    ports = SagePorts(settings=PortSettings(fixed={"store": taken}))

    with pytest.raises(ResourceError, match=rf"port {taken} .*for store.*PORTS_FIXED__STORE"):
        ports.listen("store")
    with ports.listen("another") as free:
        assert free.getsockname()[1] != taken


def test_a_configured_port_is_taken():
    with SagePorts(settings=FREE).reserve("probe") as probe:
        port = probe.port
    ports = SagePorts(settings=PortSettings(fixed={"store": port}))

    with ports.listen("store") as listener:
        assert listener.getsockname()[1] == port


def test_a_reserved_port_is_refused_to_others_until_released():
    reservation = SagePorts(settings=FREE).reserve("store")
    ports = SagePorts((reservation.port, reservation.port), settings=FREE)

    with pytest.raises(ResourceError):
        ports.listen("other")
    port = reservation.release()
    with ports.listen("other") as listener:
        assert listener.getsockname()[1] == port == reservation.release()


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("SAGELLM_COMM_PORTS_RANGE", "41000-42000")
    monkeypatch.setenv("SAGELLM_COMM_PORTS_FIXED__STORE", "43210")

    ports = SagePorts()

    assert ports.range == (41000, 42000)
    assert ports._fixed == {"store": 43210}


@pytest.mark.parametrize("value", ["x", "5-1", "0-70000", (1,), (1.5, 2)])
def test_a_bad_range_is_refused(value):
    with pytest.raises(ConfigError, match="range"):
        SagePorts(value, settings=FREE)


def test_an_address_that_is_not_ours_is_refused():
    with pytest.raises(ConfigError, match=r"cannot listen on 203\.0\.113\.1 .*PORTS_HOST"):
        SagePorts(settings=FREE).listen("a", host="203.0.113.1")


@pytest.mark.parametrize("name", ["", "A", "a-b"])
def test_an_odd_name_is_refused(name):
    with pytest.raises(ConfigError, match="no name of a port"):
        SagePorts(settings=FREE).listen(name)


def test_ipv6_loopback():
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        listener = SagePorts(settings=FREE).listen("a", host="::1")
    except ConfigError as e:
        pytest.skip(str(e))
    with listener:
        assert listener.family == socket.AF_INET6
