"""The controller's sockets: whose they are, what is stale, who may come in."""

from __future__ import annotations

import os
import shlex
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from moectl.errors import StateError, UsageError
from moectl.server.sockets import listen_tcp, listen_unix
from tests.support.sshd import find_free_port


def test_a_unix_socket_is_its_users_only(tmp_path: Path) -> None:
    path = tmp_path / "run" / "moectl.sock"
    before = os.umask(0)
    try:
        with listen_unix(path):
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.with_name("moectl.sock.lock").stat().st_mode) == 0o600
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
    finally:
        os.umask(before)
    assert not path.exists()


def test_what_has_its_name_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "moectl.sock"
    seen: list[bool] = []
    listen = socket.socket.listen

    def look(self: socket.socket, backlog: int) -> None:
        seen.append(path.exists())
        listen(self, backlog)

    monkeypatch.setattr(socket.socket, "listen", look)
    with listen_unix(path):
        assert seen == [False]
        assert sorted(p.name for p in path.parent.iterdir()) == ["moectl.sock", "moectl.sock.lock"]


def test_a_second_controller_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run" / "moectl.sock"
    with listen_unix(path):
        with pytest.raises(StateError, match="already listens"), listen_unix(path):
            pass
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))  # the first one's socket is untouched


def test_a_dead_controllers_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run" / "moectl.sock"
    program = (
        "import os, sys; from pathlib import Path; from moectl.server.sockets import listen_unix\n"
        "with listen_unix(Path(sys.argv[1])): os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    assert path.is_socket()
    with listen_unix(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_unfit_places_are_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(UsageError, match="other users can write"), listen_unix(open_to_all / "s"):
        pass
    assert stat.S_IMODE(open_to_all.stat().st_mode) == 0o777
    with pytest.raises(UsageError, match="cannot listen"), listen_unix(tmp_path / ("d" * 120) / "s"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot use"), listen_unix(tmp_path / "file" / "s"):
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_interfaces_need_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="without an API key") as caught:
        listen_tcp(host, 0, has_key=False)
    assert caught.value.hint is not None
    assert "--api-key" in caught.value.hint


def test_other_interfaces_with_a_key() -> None:
    with listen_tcp("0.0.0.0", 0, has_key=True) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


def test_a_taken_port_and_no_port() -> None:
    with listen_tcp("localhost", 0, has_key=False) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(StateError, match=f"port {port}"):
            listen_tcp("127.0.0.1", port, has_key=False)
    for host, port in (("127.0.0.1", 65536), ("127.0.0.1", -1), ("no such host", 80), ("", 80), ("x" * 300, 80)):
        with pytest.raises(UsageError):
            listen_tcp(host, port, has_key=True)


def test_a_place_that_refuses_is_told(tmp_path: Path) -> None:
    (tmp_path / "s.lock").mkdir()
    with pytest.raises(UsageError, match="cannot use") as caught, listen_unix(tmp_path / "s"):
        pass
    assert "XDG_RUNTIME_DIR" in str(caught.value.hint)


def test_what_a_hint_about_a_place_to_listen_says_is_done(tmp_path: Path) -> None:
    place = tmp_path / "open"
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(UsageError) as caught, listen_unix(place / "s"):
        pass
    assert caught.value.hint == f"chmod 700 {place}"
    subprocess.run(shlex.split(caught.value.hint), check=True)
    with listen_unix(place / "s"), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(place / "s"))
    with pytest.raises(UsageError) as caught:
        listen_tcp("0.0.0.0", 0, has_key=False)
    assert caught.value.hint == "give --api-key or --api-key-file, or keep to --host 127.0.0.1"
    for host, has_key in (("0.0.0.0", True), ("127.0.0.1", False)):
        listen_tcp(host, 0, has_key=has_key).close()
    with listen_tcp("localhost", 0, has_key=False) as taken, pytest.raises(StateError) as refused:
        listen_tcp("localhost", taken.getsockname()[1], has_key=False)
    assert refused.value.hint == "choose another --port"
    with (
        listen_tcp("localhost", 0, has_key=False) as taken,
        listen_tcp("localhost", find_free_port(), has_key=False) as other,
    ):
        assert taken.getsockname()[1] != other.getsockname()[1]
