"""Real sockets on the loopback."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from homegptd.adapters.sockets import CannotListen, listening, parse_listen


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def answers(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=2):
            return True
    except OSError:
        return False


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("127.0.0.1:9000", ("127.0.0.1", 9000)),
        ("[::]:9000", ("::", 9000)),
        ("[::1]:9000", ("::1", 9000)),
        ("localhost:9000", ("localhost", 9000)),
        (":9000", ("", 9000)),
        ("*:9000", ("", 9000)),
        ("9000", ("", 9000)),
        ("127.0.0.1", ("127.0.0.1", 80)),
        ("[::1]", ("::1", 80)),
    ],
)
def test_every_spelling_of_an_address(text: str, parsed: tuple[str, int]) -> None:
    assert parse_listen(text, 80) == parsed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("::1:9000", r"IPv6 is written \[::1\]:9000"),
        ("127.0.0.1:http", "is not ADDRESS:PORT"),
        ("127.0.0.1:70000", "at most 65535"),
        ("127.0.0.1", "names no port"),
        ("", "names no port"),
    ],
)
def test_a_wrong_address_is_told(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_listen(text)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_literal_address_is_one_socket(stack: ExitStack, address: str) -> None:
    (sock,) = (stack.enter_context(sock) for sock in listening(address, 0))
    port = sock.getsockname()[1]
    assert answers(address, port)
    assert not answers({"127.0.0.1": "::1", "::1": "127.0.0.1"}[address], port)
    assert not sock.getblocking()


@pytest.mark.parametrize("address", ["", "::"])
def test_every_address_is_both_families(stack: ExitStack, address: str) -> None:
    (sock,) = (stack.enter_context(sock) for sock in listening(address, 0))
    port = sock.getsockname()[1]
    assert answers("127.0.0.1", port)
    assert answers("::1", port)


def test_all_of_a_name_listen_on_one_port(stack: ExitStack) -> None:
    socks = [stack.enter_context(sock) for sock in listening("localhost", 0)]
    assert len({sock.getsockname()[1] for sock in socks}) == 1
    assert answers("localhost", socks[0].getsockname()[1])


def test_a_port_in_use_is_told_with_the_next_command(stack: ExitStack) -> None:
    (sock,) = (stack.enter_context(sock) for sock in listening("127.0.0.1", 0))
    port = sock.getsockname()[1]
    with pytest.raises(CannotListen) as caught:
        listening("127.0.0.1", port)
    assert caught.value.message == f"cannot listen on 127.0.0.1:{port}: address already in use"
    assert caught.value.hint == f"ss -ltnp 'sport = :{port}'"
    assert caught.value.lasting


def test_an_address_of_another_box_is_told() -> None:
    with pytest.raises(CannotListen, match=r"192\.0\.2\.1:9000: cannot assign requested address"):
        listening("192.0.2.1", 9000)


def test_a_name_nobody_knows_is_told() -> None:
    with pytest.raises(CannotListen, match=r"cannot listen on no\.such\.invalid:9000"):
        listening("no.such.invalid", 9000)


def test_a_failure_leaves_no_socket_open(stack: ExitStack) -> None:
    (taken,) = (stack.enter_context(sock) for sock in listening("::1", 0))
    before = open_files()
    with pytest.raises(CannotListen):
        listening("::1", taken.getsockname()[1])
    assert open_files() == before
