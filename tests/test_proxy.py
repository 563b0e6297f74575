"""The bad link that other tests rely on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from proxy import PATIENCE_S, Proxy


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends everything back."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_serve, args=(server,), daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def _serve(server: socket.socket) -> None:
    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                while piece := connection.recv(1 << 16):
                    connection.sendall(piece)
            except OSError:
                pass

    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


@contextmanager
def connected(proxy: Proxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), PATIENCE_S) as connection:
        yield connection


def said_back(connection: socket.socket, words: bytes) -> bytes:
    connection.sendall(words)
    answer = b""
    while len(answer) < len(words):
        answer += connection.recv(1 << 16)
    return answer


def test_what_goes_through_is_counted(echo: int) -> None:
    words = bytes(range(256)) * 4000
    with Proxy(echo) as proxy, connected(proxy) as one, connected(proxy) as two:
        assert said_back(one, b"hello") == b"hello"
        sending = threading.Thread(target=two.sendall, args=(words,))
        sending.start()
        answer = b""
        while len(answer) < len(words):
            answer += two.recv(1 << 16)
        sending.join()
        assert answer == words
        assert (proxy.up, proxy.down, proxy.connections) == (5 + len(words), 5 + len(words), 2)


def test_a_cut_resets_connections_and_lets_new_ones_in(echo: int) -> None:
    with Proxy(echo) as proxy, connected(proxy) as connection:
        assert said_back(connection, b"hello") == b"hello"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        with connected(proxy) as again:
            assert said_back(again, b"hello") == b"hello"


def test_a_cut_at_a_number_of_bytes(echo: int) -> None:
    with Proxy(echo) as proxy:
        proxy.cut_at(up=[8], down=[13])
        for _ in range(2):  # the first ends with 10 bytes up and 5 down, the second with 20 and 15
            with connected(proxy) as connection:
                assert said_back(connection, b"hello") == b"hello"
                connection.sendall(b"again")
                with pytest.raises(ConnectionResetError):
                    connection.recv(1)
        assert (proxy.up, proxy.down) == (20, 15)
        with connected(proxy) as connection:
            assert said_back(connection, b"hello") == b"hello"


def test_nobody_is_let_in_while_it_refuses(echo: int) -> None:
    with Proxy(echo) as proxy, connected(proxy) as connection:
        assert said_back(connection, b"hello") == b"hello"
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        with pytest.raises(ConnectionRefusedError), connected(proxy):
            pass
        proxy.allow()
        with connected(proxy) as again:
            assert said_back(again, b"hello") == b"hello"


def test_a_link_that_hangs_keeps_its_connections_and_goes_on(echo: int) -> None:
    with Proxy(echo) as proxy, connected(proxy) as connection:
        assert said_back(connection, b"hello") == b"hello"
        proxy.hang()
        connection.sendall(b"later")
        with connected(proxy) as another:
            another.sendall(b"later")
            proxy.wait(lambda it: it.connections == 2)
            for held in (connection, another):
                held.settimeout(0.05)
                with pytest.raises(TimeoutError):
                    held.recv(1)
                held.settimeout(PATIENCE_S)
            proxy.allow()
            for held in (connection, another):
                assert held.recv(5) == b"later"


def test_a_link_that_leads_nowhere_until_there_is_somebody(echo: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()[1]
    with Proxy(nobody) as proxy:
        with pytest.raises(ConnectionResetError), connected(proxy) as connection:
            connection.recv(1)
        proxy.target = echo
        with connected(proxy) as connection:
            assert said_back(connection, b"hello") == b"hello"
