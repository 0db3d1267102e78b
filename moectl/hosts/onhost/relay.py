"""Pass files from host to host while a deploy runs: one host serves them by SHA-256, another one takes them.

Both programs run on hosts. Orders and heartbeats are lines on stdin; the programs end when stdin ends or is silent.
They know no models and decide nothing: an order names the host to take from.

    python -m moectl.hosts.onhost.relay serve        {"bind": [addresses]} first; answers {"at": [[address, port]]}
                                        {"admit": token} lets one connection in; answers {"admitted": true}
                                        {"offer": {sha256: [path, bytes]}} adds files that are whole and verified
    python -m moectl.hosts.onhost.relay take         {"at": …, "token": …, "floor": bytes per second} first
                                        {"path": …, "bytes": …, "sha256": …} asks for a file; answers {"kept": n},
                                        {"more": n} …, {"done": sha256}
    An empty line is a heartbeat; answers {"alive": true}. A failure is {"error": …}; then the program ends.

Between hosts (TCP): the server sends a challenge, and both sides prove by HMAC-SHA256 that they know the token, which
never crosses the network. A token opens one connection. A request is a SHA-256 and an offset: no path crosses, so no
path can lead out of a directory. The bytes are not encrypted, as tensors are not; the taker hashes them.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import queue
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moectl.hosts.onhost import files as node
from moectl.hosts.onhost.prelude import tell

BEAT_S = 5.0  # the operator's machine sends a line at least this often
SILENCE_S = 30.0  # without a line for this long, the program ends: the operator's machine may be gone
CONNECT_S = 4.0
HANDSHAKE_S = 5.0
WAIT_S = 2.0  # a server that does not have the file yet says so this often
STALL_S = 15.0
SEND_S = 60.0  # a taker may have to wait for its disk
WINDOW_S = 10.0  # over which a peer's speed is measured
STRANGERS = 16  # connections that have not proved yet that they know a token, at most
NONCE_BYTES = 32
REQUEST_BYTES = 32 + 8
TELL_BYTES = 4 << 20
WAIT, GO = b"w", b"g"

Address = tuple[str, int]


class PeerRefused(Exception):
    """A peer cannot be used; args are (why,)."""


def prove(token: bytes, role: bytes, challenge: bytes) -> bytes:
    """Return the proof, for the sender of the challenge, that we know the token."""
    return hmac.digest(token, b"moectl relay " + role + challenge, "sha256")


class Server:
    """Sends files, by their SHA-256, to each peer that knows an admitted token."""

    def __init__(self, *, patience_s: float = HANDSHAKE_S) -> None:
        """Give each new connection `patience_s` to prove that it knows a token."""
        self._patience_s = patience_s
        self._tokens: set[bytes] = set()
        self._files: dict[bytes, tuple[str, int]] = {}
        self._changed = threading.Condition()
        self._strangers = threading.BoundedSemaphore(STRANGERS)

    def listen(self, addresses: Sequence[str]) -> list[Address]:
        """Open a port at each address that is this host's own. Raises OSError when none is."""
        opened, last = [], OSError("no address to listen at")
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            try:
                listener = socket.create_server((address, 0), family=family)
            except OSError as error:
                last = error
                continue
            opened.append((address, int(listener.getsockname()[1])))
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        if not opened:
            raise last
        return opened

    def admit(self, token: bytes) -> None:
        """Allow one connection that knows this token."""
        with self._changed:
            self._tokens.add(token)

    def offer(self, files: dict[bytes, tuple[str, int]]) -> None:
        """Send these files too from now on: SHA-256 → (path, bytes)."""
        with self._changed:
            self._files.update(files)
            self._changed.notify_all()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            self._strangers.acquire()
            try:
                peer, _ = listener.accept()
            except OSError:
                self._strangers.release()
                time.sleep(0.1)  # no file descriptor is left: an attack, or a very busy host
                continue
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError):
            try:
                admitted = self._let_in(peer)
            finally:
                self._strangers.release()
            if admitted:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                while self._hand_out(peer):
                    pass

    def _let_in(self, peer: socket.socket) -> bool:
        challenge = os.urandom(NONCE_BYTES)
        peer.settimeout(self._patience_s)
        peer.sendall(challenge)
        answer = receive_exactly(peer, NONCE_BYTES + 32, self._patience_s)
        if answer is None:
            return False
        challenge += answer[:NONCE_BYTES]
        with self._changed:
            known = [t for t in self._tokens if hmac.compare_digest(prove(t, b"taker", challenge), answer[-32:])]
            self._tokens.difference_update(known)  # once only
        if not known:
            return False
        peer.sendall(prove(known[0], b"server", challenge))
        return True

    def _hand_out(self, peer: socket.socket) -> bool:
        """Answer one request; False when no more comes."""
        peer.settimeout(None)  # the taker may not have its next order yet
        request = receive_exactly(peer, REQUEST_BYTES)
        if request is None:
            return False
        peer.settimeout(SEND_S)
        path, size = self._await_file(peer, request[:32])
        offset = int.from_bytes(request[32:], "big")
        if offset > size:
            return False
        with open(path, "rb") as f:  # noqa: PTH123 (paths arrive as strings)
            peer.sendall(GO)
            return offset == size or peer.sendfile(f, offset, size - offset) == size - offset

    def _await_file(self, peer: socket.socket, digest: bytes) -> tuple[str, int]:
        while True:
            with self._changed:
                if digest in self._files or self._changed.wait_for(lambda: digest in self._files, WAIT_S):
                    return self._files[digest]
            peer.sendall(WAIT)


def receive_exactly(peer: socket.socket, count: int, timeout_s: float | None = None) -> bytes | None:
    """Return this many bytes, all within `timeout_s`; None when the peer ends first. Raises OSError."""
    end = None if timeout_s is None else time.monotonic() + timeout_s
    data = b""
    while len(data) < count:
        if end is not None:
            peer.settimeout(max(0.001, end - time.monotonic()))  # a very slow peer must not keep its place
        block = peer.recv(count - len(data))
        if not block:
            return None
        data += block
    return data


class Peer:
    """A connection to a server, with proofs of both sides. Below `floor` bytes per second, it counts as broken."""

    def __init__(self, at: Sequence[Address], token: bytes, floor: float) -> None:
        """Connect to the first address that answers. Raises PeerRefused."""
        self._floor = floor
        self._began_s, self._got = 0.0, 0
        why = "it has no address"
        for address, port in at:
            with contextlib.ExitStack() as failed:
                try:
                    self._socket = failed.enter_context(socket.create_connection((address, port), CONNECT_S))
                    self._introduce(token)
                except OSError as error:
                    why = f"{address}: {error.strerror or error}"
                    continue
                failed.pop_all()
                return
        raise PeerRefused(why)

    def _introduce(self, token: bytes) -> None:
        challenge = receive_exactly(self._socket, NONCE_BYTES, HANDSHAKE_S)
        if challenge is None:
            raise ConnectionError("it sent no challenge")
        ours = os.urandom(NONCE_BYTES)
        self._socket.settimeout(HANDSHAKE_S)
        self._socket.sendall(ours + prove(token, b"taker", challenge + ours))
        proof = receive_exactly(self._socket, 32, HANDSHAKE_S)
        if proof is None or not hmac.compare_digest(proof, prove(token, b"server", challenge + ours)):
            raise ConnectionError("it does not know the token")
        self._socket.settimeout(STALL_S)

    def ask(self, sha256: str, offset: int) -> None:
        """Ask for a file from `offset` on, and wait until the server has it. Raises PeerRefused."""
        try:
            self._socket.sendall(bytes.fromhex(sha256) + offset.to_bytes(8, "big"))
            while (said := self._socket.recv(1)) == WAIT:
                pass
        except OSError as error:
            raise PeerRefused(str(error.strerror or error)) from None
        if said != GO:
            raise PeerRefused("it hung up")
        self._began_s, self._got = time.monotonic(), 0

    def read(self, count: int) -> bytes:
        """Return some bytes of the file that was asked for. Raises PeerRefused."""
        try:
            block = self._socket.recv(count)
        except OSError as error:
            raise PeerRefused(str(error.strerror or error)) from None
        if not block:
            raise PeerRefused("it hung up")
        self._got += len(block)
        spent_s = time.monotonic() - self._began_s
        if spent_s >= WINDOW_S:
            if self._got < self._floor * spent_s:
                raise PeerRefused(f"it is slow: {self._got / spent_s / 1e6:.2f} MB/s")
            self._began_s, self._got = time.monotonic(), 0
        return block

    def close(self) -> None:
        self._socket.close()


def take_file(peer: Peer, wanted: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """Complete one file from a peer, as `files.receive` does; it starts over where an earlier push left wrong bytes.

    Raises PeerRefused, and what `files.receive` raises.
    """
    path, size, sha256 = wanted["path"], wanted["bytes"], wanted["sha256"]
    untold = 0

    def resume(kept: int) -> None:
        tell({"kept": kept})
        if kept < size:
            peer.ask(sha256, kept)

    def read(count: int) -> bytes:
        nonlocal untold
        block = peer.read(count)
        untold += len(block)
        if untold >= TELL_BYTES:
            tell({"more": untold})
            untold = 0
        return block

    try:
        node.receive(read, path, size, sha256, resume)
    except node.Mismatch as error:
        if not error.args[1]:
            raise
        tell({"more": untold - size})
        untold = 0
        node.receive(read, path, size, sha256, resume)
    tell({"more": untold})
    tell({"done": sha256})


def _orders() -> Iterator[dict[str, Any]]:
    """Yield the orders on stdin until it ends, or is silent for too long."""
    waiting = b""
    while True:
        ready, _, _ = select.select([0], [], [], SILENCE_S)
        block = os.read(0, 1 << 16) if ready else b""
        if not block:
            return
        *lines, waiting = (waiting + block).split(b"\n")
        for line in lines:
            if line:
                yield json.loads(line)
            else:
                _tell({"alive": True})


_telling = threading.Lock()


def _tell(answer: dict[str, Any]) -> None:
    with _telling:
        tell(answer)


def _serve(orders: Iterator[dict[str, Any]]) -> None:
    server = Server()
    _tell({"at": server.listen(next(orders)["bind"])})
    for order in orders:
        if "admit" in order:
            server.admit(bytes.fromhex(order["admit"]))
            _tell({"admitted": True})
        else:
            server.offer({bytes.fromhex(sha256): (path, size) for sha256, (path, size) in order["offer"].items()})


def _take(orders: Iterator[dict[str, Any]]) -> None:
    first = next(orders)
    wanted: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def work() -> None:
        try:
            peer = Peer(
                [(address, port) for address, port in first["at"]], bytes.fromhex(first["token"]), first["floor"]
            )
            while True:
                take_file(peer, wanted.get(), _tell)
        except PeerRefused as error:
            _end({"error": "peer", "reason": error.args[0]})
        except Exception as error:
            _end(node.describe_failure(error))

    threading.Thread(target=work, daemon=True).start()
    for order in orders:
        wanted.put(order)


def _end(answer: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        _tell(answer)
    os._exit(1)  # another thread waits for stdin


def _main(command: str) -> None:
    orders = _orders()
    try:
        with contextlib.suppress(StopIteration):
            (_serve if command == "serve" else _take)(orders)
    except Exception as error:
        _end(node.describe_failure(error))
    os._exit(0)  # its threads need not finish: the operator's machine is gone


if __name__ == "__main__":
    _main(sys.argv[1])
