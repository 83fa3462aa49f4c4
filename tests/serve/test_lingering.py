"""Refusals over a real connection, whose client is still sending."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from pipeline.serve import lingering
from pipeline.serve.app import Site, build_app
from tests.serve.browser import serving
from tests.serve.conftest import PORT, TOKEN

MEGABYTES = 6  # more than the buffers of both ends take


@pytest.fixture(scope="module")
def address(site: Site) -> Iterator[tuple[str, int]]:
    with serving(build_app(site)) as port:
        yield "127.0.0.1", port


def sent(address: tuple[str, int], length: int, token: str = TOKEN) -> socket.socket:
    """A connection to which the head of a request went, and the first kilobyte of its body."""
    connection = socket.create_connection(address, timeout=30)
    head = (
        f"POST /embed HTTP/1.1\r\nHost: localhost:{PORT}\r\nConnection: close\r\n"
        f"Authorization: Bearer {token}\r\nContent-Length: {length}\r\n\r\n"
    )
    connection.sendall(head.encode() + b"x" * 1000)
    return connection


@pytest.mark.parametrize(("token", "status"), [(TOKEN, b" 413 "), ("wrong", b" 401 ")])
def test_who_sends_all_before_reading_reads_the_sentence(
    address: tuple[str, int], token: str, status: bytes
) -> None:
    """Fails with a broken pipe where the server closes as soon as it has answered."""
    length = MEGABYTES * 1_000_000
    with sent(address, length, token) as connection:
        time.sleep(0.3)  # by now it is answered
        for _ in range(MEGABYTES):
            connection.sendall(b"x" * (length // MEGABYTES))
            time.sleep(0.02)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert status in answer.partition(b"\r\n")[0]
    assert answer.endswith(b'"}')


def test_who_stops_sending_has_the_answer_at_once_and_is_let_go(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before the time of a body is over."""
    monkeypatch.setattr(lingering, "SILENCE_S", 0.3)
    patient = replace(site, limits=replace(site.limits, timeout_s=600))
    with serving(build_app(patient)) as port, sent(("127.0.0.1", port), 10**12) as connection:
        head = b""
        while not head.endswith(b'"}'):
            more = connection.recv(4096)
            assert more, head
            head += more
        assert b" 413 " in head
        assert connection.recv(4096) == b""  # ended, although a terabyte was announced


def test_who_sends_without_end_is_let_go_after_the_time_of_a_body(
    address: tuple[str, int], site: Site
) -> None:
    begun = time.monotonic()
    with sent(address, 10**12) as connection, pytest.raises(OSError):
        while time.monotonic() < begun + 10 * site.limits.timeout_s:
            connection.sendall(b"x" * 100_000)
            time.sleep(0.01)
