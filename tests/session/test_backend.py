"""The environment of a rank equals what mlx.launch makes for the same hostfile. Needs no second machine."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest
from mlx._distributed_utils import common, launch

from moectl.engine.protocol import Listening
from moectl.errors import HostsError, VersionMismatch
from moectl.hosts.hostfile import Host, parse_hosts
from moectl.session.backend import check_rdma, choose_backend, make_connect
from moectl.session.target import split_envs

PORT = 32323


def hostfile(rows: list[dict[str, Any]], **more: Any) -> str:
    return json.dumps({"hosts": rows, **more})


def mesh(n: int) -> str:
    rows = [
        {
            "ssh": f"mac{i}",
            "ips": [f"10.0.0.{i + 1}"],
            "rdma": [None if i == j else f"rdma_en{2 + j}" for j in range(n)],
        }
        for i in range(n)
    ]
    return hostfile(rows, backend="jaccl", envs=["MLX_METAL_FAST_SYNCH=1"])


def neighbours(n: int) -> str:
    rows = json.loads(mesh(n))["hosts"]
    for i, row in enumerate(rows):
        row["rdma"] = [d if j in ((i - 1) % n, (i + 1) % n) else None for j, d in enumerate(row["rdma"])]
    return hostfile(rows)


def launched_by_mlx(
    text: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[dict[str, str], dict[str, str]]]:
    """Return (environment, files) per rank as mlx.launch would set them, without starting anything."""
    path = tmp_path / "hosts.json"
    path.write_text(text)
    hosts = common.Hostfile.from_file(path)
    seen: list[Any] = []
    monkeypatch.setattr(launch, "_launch_with_io", lambda command, arguments, verbose: seen.extend(arguments))
    args = Namespace(
        env=list(hosts.envs),
        cwd=None,
        verbose=False,
        python=None,
        starting_port=PORT,
        connections_per_ip=1,
        backend=backend,
    )
    start = launch.launch_ring if backend == "ring" else launch.launch_jaccl
    start(ArgumentParser(), hosts.hosts, args, ["program"])
    result = []
    for (rank, _, _, _, files, env, _), _ in seen:
        variables = dict(e.split("=", 1) for e in env) | {"MLX_RANK": str(rank)}
        result.append((variables, files))
    return result


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        ("ring", mesh(2)),
        ("ring", mesh(4)),
        ("jaccl", mesh(2)),
        ("jaccl", mesh(4)),
        ("jaccl-ring", mesh(3)),
        ("jaccl-ring", neighbours(4)),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # mlx leaves the hostfile open
def test_environment_equals_mlx_launch(
    backend: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = launched_by_mlx(text, backend, tmp_path, monkeypatch)
    listed = parse_hosts(text)
    ports = range(PORT, PORT + len(listed.hosts))
    endpoints = [[f"{host.ips[0]}:{port}"] for host, port in zip(listed.hosts, ports, strict=True)]
    assert len(theirs) == len(listed.hosts)
    for rank, (env, files) in enumerate(theirs):
        ours = make_connect(backend, listed.hosts, endpoints, rank, 7)
        assert ours.nonce == 7
        # The hostfile's own variables are set when the worker starts, the group's when it joins.
        assert {**split_envs(listed.envs), **ours.env} == env
        assert {k: json.loads(v) for k, v in ours.files.items()} == {k: json.loads(v) for k, v in files.items()}


def test_auto_takes_rdma_where_the_hosts_name_it() -> None:
    assert choose_backend("auto", parse_hosts(mesh(3)).hosts) == "jaccl"
    assert choose_backend("auto", parse_hosts(neighbours(4)).hosts) == "jaccl-ring"
    assert choose_backend("auto", [Host("a"), Host("b")]) == "ring"
    assert choose_backend("auto", [Host("a")]) == "ring"


def test_auto_takes_the_ring_where_one_rank_sends_to_another() -> None:
    hosts = parse_hosts(mesh(3)).hosts
    assert choose_backend("auto", hosts, split="layers") == "ring"
    assert choose_backend("auto", hosts, split="tensor") == "jaccl"


@pytest.mark.parametrize("said", ["", "any"])
def test_a_hostfile_that_names_no_backend_gets_the_best(said: str) -> None:
    found = parse_hosts(hostfile(json.loads(mesh(3))["hosts"], backend=said))
    assert choose_backend(found.backend, found.hosts) == "jaccl"
    assert choose_backend(found.backend, [Host("a"), Host("b")]) == "ring"


def test_a_missing_device_is_named() -> None:
    with pytest.raises(HostsError, match="no RDMA device is listed for mac0 to mac2"):
        choose_backend("jaccl", parse_hosts(neighbours(4)).hosts)


def test_rdma_without_devices_is_refused() -> None:
    with pytest.raises(HostsError, match="names 0 devices, expected one per host"):
        choose_backend("jaccl", [Host("a"), Host("b")])


def test_a_device_towards_itself_is_refused() -> None:
    hosts = [Host("a", rdma=("rdma_en1", "rdma_en2")), Host("b", rdma=("rdma_en1", None))]
    with pytest.raises(HostsError, match="is the host itself"):
        choose_backend("jaccl", hosts)


def test_unknown_backend() -> None:
    with pytest.raises(HostsError, match="one of auto, ring, jaccl, jaccl-ring"):
        choose_backend("mpi", [Host("a")])


def test_what_a_hint_about_devices_says_is_taken() -> None:
    second, mended = Host("mac1", rdma=("rdma_en2", None)), Host("mac0", rdma=(None, "rdma_en2"))
    for wrong, backend, hint in (
        (
            Host("mac0", rdma=(None,)),
            "jaccl",
            "list one device per host in rank order and '-' for the host itself, or use --backend ring",
        ),
        (Host("mac0", rdma=(None, None)), "jaccl-ring", "add it to rdma=, or use --backend ring"),
    ):
        with pytest.raises(HostsError) as caught:
            choose_backend(backend, (wrong, second))
        assert caught.value.hint == hint
        assert choose_backend(backend, (mended, second)) == backend
        assert choose_backend("ring", (wrong, second)) == "ring"


def listening(macos: str | None, *, wheel: str = "macosx_26_0_arm64", jaccl: bool | None = True) -> Listening:
    return Listening({}, [9], macos=macos, wheel=wheel, jaccl=jaccl)


def test_rdma_between_macs_that_can_do_it() -> None:
    hosts = parse_hosts(mesh(2)).hosts
    check_rdma(hosts, [listening("26.2"), listening("26.2.1")])
    check_rdma(hosts, [listening("26.4"), listening("27.0")])
    check_rdma(hosts, [listening(None, jaccl=None), listening(None, jaccl=None)])  # they told nothing
    with pytest.raises(VersionMismatch, match=r"macOS 26\.2 or newer: 26\.1 on mac1"):
        check_rdma(hosts, [listening("26.4"), listening("26.1")])
    with pytest.raises(VersionMismatch, match=r"hangs or gives wrong numbers.*: 26\.2 on mac0, 26\.4 on mac1"):
        check_rdma(hosts, [listening("26.2"), listening("26.4")])
    with pytest.raises(VersionMismatch, match="mac1: its mlx is the wheel for macOS 14"):
        check_rdma(hosts, [listening("26.4"), listening("26.4", wheel="macosx_14_0_arm64", jaccl=False)])


def test_without_rdma_the_ring_of_the_hint_is_taken() -> None:
    hosts = parse_hosts(mesh(2)).hosts
    linux = listening(None, wheel="manylinux_2_35_x86_64", jaccl=False)
    with pytest.raises(VersionMismatch, match=r"mac0: its mlx has no RDMA \(JACCL\): it is the wheel many") as caught:
        check_rdma(hosts, [linux, linux])
    assert caught.value.hint == "use --backend ring"
    assert choose_backend("ring", hosts) == "ring"
