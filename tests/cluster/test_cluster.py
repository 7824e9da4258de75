# SPDX-License-Identifier: Apache-2.0
"""The secret, where process 0 listens, and what processes do alike or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from slora_jax.cluster import SECRET_VARIABLE, Cluster, ClusterError, Peers
from slora_jax.cluster.address import Address, free_port, listen
from tests.security.linking import SECRET, Background, channels, meeting


def test_a_secret_file_is_this_users_alone(tmp_path):
    file = tmp_path / "secret"
    file.write_bytes(SECRET + b"\n")
    file.chmod(0o600)
    cluster = Cluster.of("host:1", 2, 0, file)
    assert cluster is not None
    assert cluster.secret == SECRET
    for mode in (0o604, 0o640, 0o660, 0o644, 0o602):
        file.chmod(mode)
        with pytest.raises(ValueError, match=rf"other users \(mode {mode:04o}\): chmod 600"):
            Cluster.of("host:1", 2, 0, file)


def test_what_is_no_secret_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo", 0o600)
    short, long = tmp_path / "short", tmp_path / "long"
    short.write_bytes(b"fifteen bytes..")
    long.write_bytes(bytes(5000))
    for file in (short, long):
        file.chmod(0o600)
    for file, message in [
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path, "directory|regular"),
        (tmp_path / "nothing", "No such file"),
        (short, "has 15 bytes, and needs at least 16; make one with: openssl rand -hex 32"),
        (long, "longer than 4096 bytes"),
    ]:
        with pytest.raises(ValueError, match=message):
            Cluster.of("host:1", 2, 0, file)
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    with pytest.raises(ValueError, match=SECRET_VARIABLE):
        Cluster("host:1", 2, 0)


def test_process_0_listens_at_one_address_of_its_own():
    for host in ("127.0.0.1", "localhost"):
        with listen(Address(host, free_port("127.0.0.1").port), "x") as listening:
            assert listening.getsockname()[0] in ("127.0.0.1", "::1")
            with pytest.raises(OSError, match="can't listen at"):
                listen(Address(*listening.getsockname()[:2]), "x")
    with pytest.raises(ValueError, match=r"'192\.0\.2\.1' stands for .*no address of this machine"):
        listen(Address("192.0.2.1", 4567), "coordinator_address")


def has_ipv6() -> bool:
    try:
        free_port("::1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")
def test_ipv6():
    with meeting(host="::1") as met:
        assert str(met.here) == f"[::1]:{met.here.port}"
        assert Address.parse(str(met.here), "here") == met.here
        channel = met.come(1)
        [zero] = met.gathered().values()
        assert channel.peer_host == "::1"
        zero.send(b"x")
        assert channel.receive() == b"x"


@contextmanager
def two() -> Iterator[tuple[Peers, Peers]]:
    """Process 0 and process 1."""
    with channels() as (zero, one, _, _):
        yield Peers(0, 2, {1: zero}), Peers(1, 2, {0: one})


def boom() -> None:
    raise RuntimeError("boom")


def test_processes_that_agree_go_on():
    with two() as (zero, one):
        other = Background(lambda: one.together(lambda: "other", lambda _: {"model": "x"}))
        assert zero.together(lambda: "own", lambda _: {"model": "x"}) == "own"
        assert other.result() == "other"


def test_processes_that_do_not_agree_all_say_so():
    with two() as (zero, one):
        other = Background(lambda: one.together(lambda: None, lambda _: {"pages": "7"}))
        with pytest.raises(ValueError, match="pages is 8 in process 0 of the engine and 7 in pro"):
            zero.together(lambda: None, lambda _: {"pages": "8"})
        with pytest.raises(ValueError, match="pages is 7 in process 1 of the engine and 8 in pro"):
            other.result()


@pytest.mark.parametrize("refuses", [0, 1])
def test_what_one_refuses_the_other_hears(refuses):
    with two() as both:
        refusing = Background(lambda: both[refuses].together(boom, lambda _: {}))
        with pytest.raises(ValueError, match=rf"process {refuses} of .* refuses: .*boom"):
            both[1 - refuses].together(lambda: None, lambda _: {})
        with pytest.raises(RuntimeError, match="boom"):
            refusing.result()


def test_a_process_that_is_gone_is_named():
    with two() as (zero, one):
        one.close()
        with pytest.raises(ValueError, match="process 1 of the engine is lost: process 1 is gone"):
            zero.exchange({})
    with two() as (zero, one):
        zero.close()
        with pytest.raises(ClusterError, match="process 0 is gone"):
            one.exchange({})
