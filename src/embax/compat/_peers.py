"""An all-reduce between hosts that know each other's addresses, over TCP.

Each host listens on its port, connects to every other, and sends its values there; so each has all values, and reduces them
itself. A connection begins with who is speaking; then messages of a key and a value follow.
"""

import collections
import contextlib
import functools
import operator
import socket
import struct
import threading
import time
import weakref
from collections.abc import Sequence

from embax._checks import positive_int
from embax._preprocess.all_reduce import AllReduceInterface

TIMEOUT_S = 600.0
"""Seconds that a host waits for the others: they may compile meanwhile, or save a checkpoint."""

_HELLO = struct.Struct("!8sII")
_MESSAGE = struct.Struct("!QQ")
_MAGIC = b"embaxor1"
_RETRY_S = 0.05


def _host_and_port(address: str) -> tuple[str, int]:
    """From "host:port", "[ipv6]:port" or such with a scheme, as "ipv4:1.2.3.4:80" or "dns:///host:80"."""
    host, _, port = address.rpartition(":")
    host = host.rpartition("/")[2]
    for scheme in ("ipv4:", "ipv6:", "dns:"):
        host = host.removeprefix(scheme)
    if not host or not (port.isascii() and port.isdigit() and int(port) < 2**16):
        raise ValueError(f"The peer address is {address!r}; it must be 'host:port'.")
    return host.strip("[]"), int(port)


def _receive(connection: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes, or fewer where the other side has closed the connection."""
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            break
        data += part
    return data


class _Inbox:
    """The values that other hosts have sent: of each host and key those that were not taken yet, in order."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._values: dict[tuple[int, int], collections.deque[int]] = {}
        self._gone: set[int] = set()

    def put(self, host: int, key: int, value: int) -> None:
        with self._changed:
            self._values.setdefault((host, key), collections.deque()).append(value)
            self._changed.notify_all()

    def lose(self, host: int) -> None:
        """Notes that a host sends nothing any more."""
        with self._changed:
            self._gone.add(host)
            self._changed.notify_all()

    def take(self, hosts: Sequence[int], key: int, deadline: float) -> list[int]:
        """A value of each host.

        Raises:
            RuntimeError: a host has closed its connection instead.
            TimeoutError: not all hosts have sent theirs in time.
        """
        with self._changed:
            while missing := [host for host in hosts if (host, key) not in self._values]:
                if lost := [host for host in missing if host in self._gone]:
                    raise RuntimeError(
                        f"All-reduce of key {key}: hosts {lost} have closed their connections; see the errors there."
                    )
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(
                        f"All-reduce of key {key}: hosts {missing} sent nothing within {TIMEOUT_S:.0f} s. Every host must pack "
                        "the same batches, with the same batch numbers: see whether these have failed."
                    )
                self._changed.wait(left)
            return [self._take(host, key) for host in hosts]

    def _take(self, host: int, key: int) -> int:
        values = self._values[host, key]
        value = values.popleft()
        if not values:
            del self._values[host, key]
        return value


def _listen(server: socket.socket, inbox: _Inbox, num_hosts: int) -> None:
    """Accepts connections until the server is closed."""
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=_read, args=(connection, inbox, num_hosts), daemon=True).start()


def _read(connection: socket.socket, inbox: _Inbox, num_hosts: int) -> None:
    """Reads what one other host sends. What is no host of this group is not listened to."""
    host = None
    try:
        with connection:
            hello = _receive(connection, _HELLO.size)
            if len(hello) < _HELLO.size:
                return
            magic, number, their_hosts = _HELLO.unpack(hello)
            if magic != _MAGIC or their_hosts != num_hosts or number >= num_hosts:
                return
            host = number
            while len(message := _receive(connection, _MESSAGE.size)) == _MESSAGE.size:
                inbox.put(host, *_MESSAGE.unpack(message))
    except OSError:
        pass
    finally:
        if host is not None:
            inbox.lose(host)


def _close_all(sockets: Sequence[socket.socket]) -> None:
    for one in sockets:
        with contextlib.suppress(OSError):  # It may be closed by the other side.
            one.shutdown(socket.SHUT_RDWR)  # Wakes what waits for it.
        one.close()


class PeerAllReduce(AllReduceInterface):
    """The interface of one host among several that reach each other by TCP. Hosts may be threads of one process.

    It listens from the start, and connects to the others when it is first called.

    Args:
        peer_addresses: "host:port" of every other host, in any order.
        port: that this host listens on.
        host_id: the number of this host, from 0 to `host_count - 1`.
        host_count: the number of hosts.

    Raises:
        ValueError: a number or an address is not what it should be.
        OSError: the port is taken.
    """

    def __init__(self, peer_addresses: Sequence[str], port: int, host_id: int, host_count: int):
        self._num_hosts = positive_int("all-reduce", "the number of hosts", host_count)
        self._host = positive_int("all-reduce", "1 + the number of this host", host_id + 1, maximum=host_count) - 1
        self._peers = [_host_and_port(address) for address in peer_addresses]
        self._connections: list[socket.socket] | None = None
        self._sending = threading.Lock()
        self._inbox = _Inbox()
        self._sockets: list[socket.socket] = []
        self._close = weakref.finalize(self, _close_all, self._sockets)
        if host_count > 1:
            server = socket.create_server(("", port))
            self._sockets.append(server)
            arguments = (server, self._inbox, host_count)
            threading.Thread(target=_listen, args=arguments, daemon=True).start()

    def close(self) -> None:
        """Ends all connections; other hosts that wait for this one get an error. What is not used any more closes itself."""
        self._close()

    def bitwise_or(self, key: int, value: int) -> int:
        """See `embax.AllReduceInterface`.

        Raises:
            ValueError: the number of addresses is not that of the other hosts.
            TimeoutError: another host cannot be reached, or sends nothing.
            RuntimeError: another host has closed its connection.
        """
        if self._num_hosts == 1:
            return value
        deadline = time.monotonic() + TIMEOUT_S
        message = _MESSAGE.pack(key, value)
        with self._sending:
            if self._connections is None:
                self._connections = self._connect(deadline)
                self._sockets += self._connections
            for connection in self._connections:
                try:
                    connection.sendall(message)
                except OSError as error:
                    raise RuntimeError(
                        f"All-reduce of key {key}: a host has closed its connection ({error})."
                    ) from error
        others = [host for host in range(self._num_hosts) if host != self._host]
        return functools.reduce(operator.or_, self._inbox.take(others, key, deadline), value)

    def _connect(self, deadline: float) -> list[socket.socket]:
        if len(self._peers) != self._num_hosts - 1:
            raise ValueError(
                f"All-reduce: there are {len(self._peers)} peer addresses for {self._num_hosts} hosts; give those of all hosts "
                "but this one."
            )
        connections = [self._connect_to(peer, deadline) for peer in self._peers]
        for connection in connections:
            connection.sendall(_HELLO.pack(_MAGIC, self._host, self._num_hosts))
        return connections

    @staticmethod
    def _connect_to(peer: tuple[str, int], deadline: float) -> socket.socket:
        while True:
            try:
                connection = socket.create_connection(peer, timeout=max(deadline - time.monotonic(), _RETRY_S))
            except OSError as error:  # It may not listen yet.
                if time.monotonic() > deadline:
                    raise TimeoutError(f"All-reduce: {peer[0]}:{peer[1]} cannot be reached: {error}.") from error
                time.sleep(_RETRY_S)
            else:
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection
