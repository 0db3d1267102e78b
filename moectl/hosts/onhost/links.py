"""The program that times TCP between two hosts: one end listens, the other connects and answers with its times.

Its text is sent to each host's own python (`python -c`), so it uses the standard library only and runs from Python 3.9
on. It writes no file, serves only a peer that knows the secret, and ends with its stdin; every wait has a limit.

    python -c TEXT listen        {"address", "secret"} on stdin; answers {"port": n}, serves until stdin ends
    python -c TEXT dial          {"address", "port", "secret", "budget_s"} on stdin; answers {"rtt_s", "out_bytes_s",
                                 "in_bytes_s"} or {"error": why, "errno": its name}; without "transfers" only "rtt_s"

Each answer is a line of JSON behind `ANSWER`. On the wire: the secret, then requests of 9 bytes, a letter and a length:
E and this many bytes to be sent back, S and bytes to be swallowed, answered by one byte, G for bytes to be given.
"""

from __future__ import annotations

import errno
import hmac
import json
import os
import socket
import statistics
import struct
import sys
import threading
import time

from moectl.hosts.onhost.prelude import end_with_stdin, tell

WAIT_S = 3.0  # for each step of the other end
ROUND_TRIPS = 60
WARM_UPS = 5
_REQUEST = struct.Struct("!cQ")
_BLOCK = bytes(1 << 18)
_PING = 8
_LONG_ENOUGH_S = 0.06  # a transfer of this time measures the bandwidth
_MOST_BYTES = 1 << 28


def listen(address: str, secret: str) -> None:
    """Serve peers that know the secret, one after the other, until this process ends."""
    with socket.create_server((address, 0)) as server:
        tell({"port": server.getsockname()[1]})
        while True:
            client, _ = server.accept()
            with client:
                _prepare(client)
                try:
                    if hmac.compare_digest(_receive(client, len(secret)), secret.encode()):
                        _serve(client)
                except OSError:
                    pass  # this peer is gone; another one may come


def dial(address: str, port: int, secret: str, budget_s: float, transfers: bool = True) -> dict[str, float]:
    """Return {"rtt_s", "out_bytes_s", "in_bytes_s"} of the way to a listener and back. Raises OSError."""
    with socket.create_connection((address, port), timeout=WAIT_S) as peer:
        _prepare(peer)
        peer.sendall(secret.encode())
        rtt_s = _time_round_trips(peer, budget_s)
        if not transfers:
            return {"rtt_s": rtt_s}
        return {
            "rtt_s": rtt_s,
            "out_bytes_s": _time_transfer(peer, b"S", rtt_s, budget_s / 4),
            "in_bytes_s": _time_transfer(peer, b"G", rtt_s, budget_s / 4),
        }


def _time_round_trips(peer: socket.socket, budget_s: float) -> float:
    """Return the median of small round trips: ROUND_TRIPS of them, fewer on a slow link."""
    seconds: list[float] = []
    begin = time.perf_counter()
    for turn in range(WARM_UPS + ROUND_TRIPS):
        start = time.perf_counter()
        peer.sendall(_REQUEST.pack(b"E", _PING) + _BLOCK[:_PING])
        _receive(peer, _PING)
        end = time.perf_counter()
        if turn >= WARM_UPS:
            seconds.append(end - start)
        if seconds and end - begin > budget_s:
            break
    return statistics.median(seconds)


def _time_transfer(peer: socket.socket, kind: bytes, rtt_s: float, budget_s: float) -> float:
    """Return bytes per second: transfers get larger until one took long enough, or the budget is spent."""
    size = len(_BLOCK)
    begin = time.perf_counter()
    while True:
        start = time.perf_counter()
        peer.sendall(_REQUEST.pack(kind, size))
        if kind == b"S":
            _send(peer, size)
            _receive(peer, 1)
        else:
            _swallow(peer, size)
        end = time.perf_counter()
        took = end - start - rtt_s
        if took > _LONG_ENOUGH_S or end - begin > budget_s or size >= _MOST_BYTES:
            return size / max(took, (end - start) / 10)
        size = min(4 * size, _MOST_BYTES)


def _serve(client: socket.socket) -> None:
    while True:
        kind, size = _REQUEST.unpack(_receive(client, _REQUEST.size))
        if size > _MOST_BYTES:
            return
        if kind == b"E":
            client.sendall(_receive(client, min(size, _PING)))
        elif kind == b"S":
            _swallow(client, size)
            client.sendall(b".")
        elif kind == b"G":
            _send(client, size)
        else:
            return


def _prepare(peer: socket.socket) -> None:
    peer.settimeout(WAIT_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _send(peer: socket.socket, size: int) -> None:
    while size:
        size -= peer.send(_BLOCK[: min(size, len(_BLOCK))])


def _receive(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        got = peer.recv(size - len(data))
        if not got:
            raise ConnectionError("the other end closed the connection")
        data += got
    return data


def _swallow(peer: socket.socket, size: int) -> None:
    buffer = bytearray(len(_BLOCK))
    while size:
        got = peer.recv_into(buffer, min(size, len(buffer)))
        if not got:
            raise ConnectionError("the other end closed the connection")
        size -= got


def _main(command: str) -> None:
    request = json.loads(sys.stdin.buffer.readline())
    end_with_stdin(lambda: os._exit(0))
    limit = threading.Timer(request.pop("limit_s"), os._exit, (1,))
    limit.daemon = True
    limit.start()
    try:
        if command == "listen":
            listen(**request)
        else:
            tell(dial(**request))
    except OSError as error:
        # A timeout of python itself has no number. Numbers differ between systems, names do not.
        name = errno.errorcode.get(error.errno or 0, "ETIMEDOUT" if isinstance(error, TimeoutError) else "")
        tell({"error": error.strerror or str(error), "errno": name})


if __name__ == "__main__":
    _main(sys.argv[1])
