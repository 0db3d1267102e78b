"""Hosts that pass files on: who is let in, what is handed out, and what becomes of a peer that fails."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moectl.hosts.onhost import relay
from moectl.hosts.onhost.files import Mismatch
from moectl.hosts.onhost.prelude import parse_answer
from moectl.hosts.onhost.relay import (
    GO,
    NONCE_BYTES,
    WAIT,
    Peer,
    PeerRefused,
    Server,
    prove,
    receive_exactly,
    take_file,
)

TOKEN = secrets.token_bytes(32)
DATA = os.urandom(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> tuple[Server, int]:
    """A server that offers DATA and lets one connection in that knows TOKEN; its port."""
    (tmp_path / "whole").write_bytes(DATA)
    server = Server()
    server.offer({bytes.fromhex(SHA256): (str(tmp_path / "whole"), len(DATA))})
    server.admit(TOKEN)
    return server, server.listen(["127.0.0.1"])[0][1]


@contextlib.contextmanager
def knock(port: int) -> Iterator[tuple[socket.socket, bytes]]:
    """Connect as anybody can; yield the connection and the challenge."""
    with socket.create_connection(("127.0.0.1", port), 10) as stranger:
        challenge = receive_exactly(stranger, NONCE_BYTES, 10)
        assert challenge is not None
        yield stranger, challenge


def everything(peer: socket.socket) -> bytes:
    """Return all that a peer sends until it hangs up, by a reset as well."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while block := peer.recv(1 << 16):
            data += block
    return data


def wanted(path: Path, data: bytes = DATA) -> dict[str, Any]:
    return {"path": str(path), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def connect(port: int, floor: float = 0.0) -> Peer:
    return Peer([("127.0.0.1", port)], TOKEN, floor)


# Who is let in.


GUESSES = {"nothing": b"", "zeros": bytes(64), "noise": os.urandom(64), "http": b"GET / HTTP/1.1\r\n\r\n" * 8}


@pytest.mark.parametrize("guess", [*GUESSES.values(), TOKEN * 2], ids=[*GUESSES, "the token itself"])
def test_who_does_not_know_the_token_gets_nothing(server: tuple[Server, int], guess: bytes) -> None:
    with knock(server[1]) as (stranger, _):
        with contextlib.suppress(OSError):  # it may have hung up already
            stranger.sendall(guess + bytes.fromhex(SHA256) + bytes(8))
            stranger.shutdown(socket.SHUT_WR)
        assert everything(stranger) == b""
    with contextlib.closing(connect(server[1])):  # and spoils nothing for who does
        pass


def test_a_proof_is_good_for_one_challenge_and_a_token_for_one_connection(server: tuple[Server, int]) -> None:
    ours = os.urandom(NONCE_BYTES)
    with knock(server[1]) as (first, challenge), knock(server[1]) as (second, other):
        assert challenge != other
        overheard = ours + prove(TOKEN, b"taker", challenge + ours)
        second.sendall(overheard + bytes.fromhex(SHA256) + bytes(8))  # somebody listened, and was faster
        assert everything(second) == b""
        first.sendall(overheard)
        assert receive_exactly(first, 32, 10) == prove(TOKEN, b"server", challenge + ours)
    with pytest.raises(PeerRefused, match="does not know the token"):
        connect(server[1])


def test_a_servers_proof_is_no_takers_proof(server: tuple[Server, int]) -> None:
    with knock(server[1]) as (stranger, challenge):
        ours = os.urandom(NONCE_BYTES)
        stranger.sendall(ours + prove(TOKEN, b"server", challenge + ours))
        assert everything(stranger) == b""


def test_a_false_server_learns_no_token_and_is_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        said: list[bytes] = []

        def impersonate() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.sendall(bytes(NONCE_BYTES))
                said.append(receive_exactly(peer, NONCE_BYTES + 32, 10) or b"")
                peer.sendall(said[0][-32:])  # all that it has ever seen

        thread = threading.Thread(target=impersonate)
        thread.start()
        with pytest.raises(PeerRefused, match="does not know the token"):
            connect(listener.getsockname()[1])
        thread.join()
    assert TOKEN not in said[0]


def test_a_crowd_of_strangers_is_bounded_and_leaves() -> None:
    server = Server(patience_s=0.1)
    server.admit(TOKEN)
    port = server.listen(["127.0.0.1"])[0][1]
    with contextlib.ExitStack() as crowd:
        strangers = [
            crowd.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(2 * relay.STRANGERS)
        ]
        with contextlib.closing(connect(port)):  # behind them all
            pass
        assert [len(everything(stranger)) for stranger in strangers] == [NONCE_BYTES] * len(strangers)


# What is handed out.


def test_a_file_is_asked_for_by_hash_and_nothing_else_is_there(
    server: tuple[Server, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "WAIT_S", 0.05)
    (tmp_path / "secret").write_bytes(b"not offered")
    with contextlib.closing(connect(server[1])) as peer:
        peer._socket.sendall(hashlib.sha256(b"not offered").digest() + bytes(8))
        assert receive_exactly(peer._socket, 3, 10) == 3 * WAIT  # it has not got it, and says so for ever


def test_an_offset_beyond_the_end_is_refused(server: tuple[Server, int]) -> None:
    with contextlib.closing(connect(server[1])) as peer, pytest.raises(PeerRefused, match="hung up"):
        peer.ask(SHA256, len(DATA) + 1)


@pytest.mark.parametrize("kept", [0, 1, 1_234_567, len(DATA) - 1, len(DATA)])
def test_a_file_is_resumed_and_verified(server: tuple[Server, int], tmp_path: Path, kept: int) -> None:
    target = tmp_path / "deep" / "er" / "file"
    target.parent.mkdir(parents=True)
    Path(f"{target}.partial").write_bytes(DATA[:kept])
    told: list[dict[str, Any]] = []
    with contextlib.closing(connect(server[1])) as peer:
        take_file(peer, wanted(target), told.append)
    assert target.read_bytes() == DATA
    assert told[0] == {"kept": kept}
    assert told[-1] == {"done": SHA256}
    assert sum(t.get("kept", 0) + t.get("more", 0) for t in told) == len(DATA)


def test_what_an_earlier_push_left_wrong_is_taken_anew(server: tuple[Server, int], tmp_path: Path) -> None:
    target = tmp_path / "file"
    Path(f"{target}.partial").write_bytes(bytes(1_000_000))
    told: list[dict[str, Any]] = []
    with contextlib.closing(connect(server[1])) as peer:
        take_file(peer, wanted(target), told.append)
    assert target.read_bytes() == DATA
    assert sum(t.get("kept", 0) + t.get("more", 0) for t in told) == len(DATA)


def test_wrong_bytes_get_no_name(server: tuple[Server, int], tmp_path: Path) -> None:
    lie = bytes(len(DATA))
    (tmp_path / "whole").write_bytes(lie)  # its disk went bad after the file was verified
    with contextlib.closing(connect(server[1])) as peer, pytest.raises(Mismatch):
        take_file(peer, wanted(tmp_path / "file"), lambda _: None)
    assert not (tmp_path / "file").exists()
    assert not (tmp_path / "file.partial").exists()


def test_a_file_that_shrank_ends_the_connection(server: tuple[Server, int], tmp_path: Path) -> None:
    os.truncate(tmp_path / "whole", 1000)
    with contextlib.closing(connect(server[1])) as peer, pytest.raises(PeerRefused, match="hung up"):
        take_file(peer, wanted(tmp_path / "file"), lambda _: None)
    assert (tmp_path / "file.partial").read_bytes() == DATA[:1000]  # what came stays


def test_a_file_that_comes_later_is_waited_for(
    server: tuple[Server, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "WAIT_S", 0.05)
    later = b"made while we wait"
    (tmp_path / "later").write_bytes(later)
    with contextlib.closing(connect(server[1])) as peer:
        timer = threading.Timer(
            0.3, server[0].offer, [{hashlib.sha256(later).digest(): (str(tmp_path / "later"), len(later))}]
        )
        timer.start()
        take_file(peer, wanted(tmp_path / "file", later), lambda _: None)
        take_file(peer, wanted(tmp_path / "second"), lambda _: None)
    timer.join()
    assert (tmp_path / "file").read_bytes() == later
    assert (tmp_path / "second").read_bytes() == DATA


# Peers that fail.


@contextlib.contextmanager
def false_peer(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that knows the token, and after a request does what `answer` does; yields its port."""

    def serve() -> None:
        peer, _ = listener.accept()
        with peer, contextlib.suppress(OSError):
            challenge = os.urandom(NONCE_BYTES)
            peer.sendall(challenge)
            proof = receive_exactly(peer, NONCE_BYTES + 32, 10) or b""
            peer.sendall(prove(TOKEN, b"server", challenge + proof[:NONCE_BYTES]))
            receive_exactly(peer, 40, 10)
            answer(peer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def test_a_slow_peer_is_left_and_what_came_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "WINDOW_S", 0.2)
    ended = threading.Event()

    def trickle(peer: socket.socket) -> None:
        peer.sendall(GO)
        for i in range(1000):
            peer.sendall(DATA[i * 100 : (i + 1) * 100])
            if ended.wait(0.01):
                return

    with false_peer(trickle) as port:
        with contextlib.closing(connect(port, floor=1e6)) as peer, pytest.raises(PeerRefused, match="it is slow"):
            take_file(peer, wanted(tmp_path / "file"), lambda _: None)
        ended.set()
    left = (tmp_path / "file.partial").read_bytes()
    assert left
    assert left == DATA[: len(left)]


def test_waiting_is_not_slowness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "WINDOW_S", 0.1)

    def late(peer: socket.socket) -> None:
        for _ in range(10):
            peer.sendall(WAIT)
            threading.Event().wait(0.03)
        peer.sendall(GO + DATA)

    with false_peer(late) as port, contextlib.closing(connect(port, floor=1e3)) as peer:
        take_file(peer, wanted(tmp_path / "file"), lambda _: None)
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_silent_peer_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "STALL_S", 0.2)
    ended = threading.Event()

    def keep_silent(_: socket.socket) -> None:
        ended.wait(10)

    with false_peer(keep_silent) as port:
        with contextlib.closing(connect(port)) as peer, pytest.raises(PeerRefused, match="timed out"):
            take_file(peer, wanted(tmp_path / "file"), lambda _: None)
        ended.set()


def test_addresses_are_tried_in_turn(server: tuple[Server, int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        dead = gone.getsockname()[1]
    with contextlib.closing(Peer([("127.0.0.1", dead), ("127.0.0.1", server[1])], TOKEN, 0)):
        pass
    with pytest.raises(PeerRefused, match=r"127\.0\.0\.1: Connection refused"):
        Peer([("127.0.0.1", dead)], TOKEN, 0)
    with pytest.raises(PeerRefused, match="no address"):
        Peer([], TOKEN, 0)


def test_only_addresses_of_its_own_are_listened_at() -> None:
    server = Server()
    assert [address for address, _ in server.listen(["192.0.2.1", "127.0.0.1"])] == ["127.0.0.1"]
    with pytest.raises(OSError, match="assign"):
        server.listen(["192.0.2.1"])


# The programs.


@contextlib.contextmanager
def program(command: str, code: str = "pass") -> Iterator[subprocess.Popen[bytes]]:
    text = f"from moectl.hosts.onhost import relay; {code}; relay._main({command!r})"
    with subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            yield child
        finally:
            child.kill()


def say(child: subprocess.Popen[bytes], **order: Any) -> None:
    assert child.stdin is not None
    child.stdin.write(json.dumps(order).encode() + b"\n" if order else b"\n")
    child.stdin.flush()


def hear(child: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert child.stdout is not None
    for line in child.stdout:
        answer = parse_answer(line)
        if answer is not None:
            return answer
    return {}


def test_one_program_serves_another(tmp_path: Path) -> None:
    (tmp_path / "whole").write_bytes(DATA)
    with program("serve") as server, program("take") as taker:
        say(server, bind=["127.0.0.1"])
        at = hear(server)["at"]
        say(server, admit=TOKEN.hex())
        assert hear(server) == {"admitted": True}
        say(taker, at=at, token=TOKEN.hex(), floor=0)
        say(taker, **wanted(tmp_path / "file"))
        say(server, offer={SHA256: [str(tmp_path / "whole"), len(DATA)]})
        assert hear(taker) == {"kept": 0}
        assert [hear(taker), hear(taker)] == [{"more": len(DATA)}, {"done": SHA256}]
        say(taker)
        assert hear(taker) == {"alive": True}
        assert server.stdin is not None
        server.stdin.close()  # the leash is let go
        assert server.wait(20) == 0
        say(taker, **wanted(tmp_path / "another"))
        assert hear(taker) == {"kept": 0}
        assert hear(taker)["error"] == "peer"
        assert taker.wait(20) == 1
    assert (tmp_path / "file").read_bytes() == DATA
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(tuple(at[0]), 5)


def test_a_program_that_hears_nothing_ends() -> None:
    with program("serve", "relay.SILENCE_S = 0.3") as child:
        say(child, bind=["127.0.0.1"])
        assert hear(child)["at"]
        assert child.wait(20) == 0  # though its stdin is open


def test_what_cannot_be_done_is_said() -> None:
    with program("serve") as child:
        say(child, bind=["192.0.2.1"])
        assert hear(child)["error"] == "os"
    with program("take") as child:
        say(child, at=[], token=TOKEN.hex(), floor=0)
        assert hear(child) == {"error": "peer", "reason": "it has no address"}
