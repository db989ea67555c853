"""A proxy between a client and its server that loses what the test wants to be lost."""

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

SIZE: Final = 1 << 16
# PostgreSQL's ReadyForQuery, up to the state of the transaction:
# https://www.postgresql.org/docs/current/protocol-message-formats.html
READY: Final = b"Z\x00\x00\x00\x05"


@dataclass
class Pair:
    """The two ends of a connection through the proxy."""

    client: socket.socket
    server: socket.socket
    deaf: bool = False

    def close(self) -> None:
        """Close both ends; a read in another thread ends, too."""
        for end in (self.client, self.server):
            close(end)


class Proxy:
    """Passes bytes on, between a port of its own and a server's.

    Args:
        port: the server's.
        postgresql: whether it speaks PostgreSQL's protocol, where an answer may come in parts.

    Attributes:
        port: the proxy's own.
        lost: set once the reply has been lost.
    """

    def __init__(self, port: int, *, postgresql: bool) -> None:
        self._target = port
        self._end = READY if postgresql else b""
        self._pairs: list[Pair] = []
        self._marker: bytes | None = None
        self.lost = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [self._start(self._accept)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        close(self._listener)
        for pair in self._pairs:
            pair.close()
        for thread in self._threads:
            thread.join(30)

    def lose_reply_to(self, marker: bytes) -> None:
        """Pass on the next request that holds these bytes, and lose the connection on its reply."""
        self._marker = marker

    def cut_clients(self) -> None:
        """Lose the connections as the clients see it; the server goes on with what it does."""
        for pair in self._pairs:
            pair.deaf = True
            close(pair.client)

    def _start(self, run: object, *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=run, args=arguments, daemon=True)  # type: ignore[arg-type]
        thread.start()
        return thread

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            pair = Pair(client, socket.create_connection(("127.0.0.1", self._target)))
            self._pairs.append(pair)
            self._threads += [self._start(self._ask, pair), self._start(self._answer, pair)]

    def _ask(self, pair: Pair) -> None:
        with suppress(OSError):
            while request := pair.client.recv(SIZE):
                if self._marker is not None and self._marker in request:
                    self._marker, pair.deaf = None, True
                    pair.server.sendall(request)
                    return
                pair.server.sendall(request)
        if not pair.deaf:
            pair.close()

    def _answer(self, pair: Pair) -> None:
        swallowed = b""
        with suppress(OSError):
            while reply := pair.server.recv(SIZE):
                if not pair.deaf:
                    pair.client.sendall(reply)
                    continue
                swallowed += reply
                if self._end in swallowed:
                    self.lost.set()
                    break
        pair.close()


def close(end: socket.socket) -> None:
    """Close a socket, and end a read from it in another thread."""
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
