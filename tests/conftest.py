"""Fixtures for all tests: a clean environment, a real sshd, four hosts in network namespaces."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from moectl.hosts.hostfile import Host
from tests.support.netns import Cluster, run_cluster
from tests.support.ring import rank_env
from tests.support.sshd import SSHD, Server, run_sshd
from tests.support.starting import starts_processes

KEPT = ("MOECTL_TEST_",)
ROOT = Path(__file__).parent.parent
COUNTED_CASES = 2  # of one test, for the lines that CI counts


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moectl")
    group.addoption("--chaos-minutes", type=float, default=0.2, help="of strikes in test_chaos (%(default)s)")
    group.addoption("--chaos-seed", type=int, default=38, help="of what it strikes with (%(default)s)")
    group.addoption("--fuzz-seconds", type=float, default=0.0, help="fuzz each target of test_fuzz for so long")
    group.addoption("--kills", type=int, default=None, help="end shard, deploy and downloads so often, each way")
    group.addoption("--long", action="store_true", help="also run the tests that are marked long")


# First, so that none of them begins when all others are done: seconds on two cores.
LONG_FILES = {
    "test_deploy": 190,
    "test_end_to_end": 160,
    "test_build": 160,
    "test_controllers": 150,
    "test_models": 120,
    "test_survival": 105,
    "test_lockstep": 75,
    "test_engine_families": 70,
    "test_chaos": 70,
    "test_crash": 60,
    "test_measured_families": 60,
    "test_session": 60,
    "test_isolation": 60,
    "test_canary": 60,
}


# No test asserts on time: an example may take as long as it takes, here as where CI is set.
settings.register_profile("untimed", settings(), deadline=None)
settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # of pytest-xdist: files stay in the order that is given below
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for jobs in the background: processes would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    """Say with which versions of the libraries that moectl stands on this run was made."""
    return ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "transformers"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes `-n auto` means: many tests wait for others, but some start four ranks at once."""
    return max(3, min(5, (os.cpu_count() or 1) // 2))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first, mark tests of the whole system, and leave out what is marked long, unless asked for.

    Deselected and not skipped, since CI takes no skip for an answer.
    """
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    cases = Counter[str]()
    for item in items:
        if item.path.parent.name == "system" or starts_processes(item):
            item.add_marker("system")
        test = item.nodeid.partition("[")[0]
        cases[test] += 1
        # Many examples or cases of the same lines: counting takes half as long again, up to thrice as long.
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False) or cases[test] > COUNTED_CASES:
            item.add_marker("no_cover")
    items.sort(key=lambda item: -LONG_FILES.get(item.path.stem, 0))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under MOECTL_TEST_STRICT (CI) nothing is skipped: what a test lacks has to be installed.

    A test that is known to fail is no skip: it was run, and it would be told if it passed.
    """
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("MOECTL_TEST_STRICT"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"{item.nodeid} may not be skipped here. {reason}"
    return report


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hide the user's own configuration, state and agent from every test."""
    for name in list(os.environ):
        if name.startswith(("MOECTL_", "XDG_", "SSH_")) and not name.startswith(KEPT):
            monkeypatch.delenv(name)
    stray = ROOT / "hub"  # huggingface_hub's cache, where HF_HOME is empty or relative
    was_there = stray.exists()
    umask = os.umask(0o022)  # what runs on a host makes it stricter, and in a test that is this process
    os.umask(umask)
    # Not among pytest's directories: their names are too long for Unix sockets, and making one reads all others.
    with tempfile.TemporaryDirectory(prefix="moe", ignore_cleanup_errors=True) as home:
        for name in ("CONFIG", "STATE", "DATA", "CACHE"):
            monkeypatch.setenv(f"XDG_{name}_HOME", f"{home}/{name.lower()}")
        Path(home, "run").mkdir(mode=0o700)
        monkeypatch.setenv("XDG_RUNTIME_DIR", f"{home}/run")
        monkeypatch.setenv("MOECTL_RUN_KEEP_ALIVE", "0")  # no test leaves a controller behind
        monkeypatch.setenv("MOECTL_DEPLOY_NO_CHECK", "1")  # where it is not what is tested, it takes long
        yield
    os.umask(umask)
    assert was_there or not stray.exists(), "this test, or one beside it, has made hub/ in the source tree"


@pytest.fixture(scope="session")
def sshd_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One sshd on localhost for the whole run."""
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("OpenSSH (sshd and ssh) is not installed")
    with run_sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def sshd(sshd_session: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """The sshd, with an ssh configuration of this test's own, already named by MOECTL_SSH_CONFIG."""
    server = replace(sshd_session, config=tmp_path / "ssh_config")
    server.config.touch()
    monkeypatch.setenv("MOECTL_SSH_CONFIG", str(server.config))
    return server


@pytest.fixture
def ssh_host(sshd: Server, tmp_path: Path) -> Host:
    """A host `node0` behind the sshd, whose root directory is this test's own."""
    return Host(sshd.add_alias("node0"), python=sys.executable, dir=str(tmp_path / "node0"))


@pytest.fixture(scope="session")
def netns_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four hosts node0 … node3 in namespaces of their own, for the whole run. Needs root and iproute2."""
    if SSHD is None:
        pytest.skip("sshd is not installed")
    if os.getuid() != 0 or any(shutil.which(tool) is None for tool in ("ip", "unshare", "nsenter")):
        pytest.skip("network namespaces need root, iproute2 and util-linux")
    with run_cluster(tmp_path_factory.mktemp("netns"), 4) as cluster:
        yield cluster


@pytest.fixture
def netns(netns_session: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The four hosts, whole again after each test; MOECTL_SSH_CONFIG names them."""
    monkeypatch.setenv("MOECTL_SSH_CONFIG", str(netns_session.config))
    yield netns_session
    netns_session.mend()


@pytest.fixture(scope="module")
def hostfile(netns_session: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLX hostfile of the four hosts: its "envs" carry the preload to the ranks."""
    rows: list[dict[str, Any]] = [
        {"ssh": host.name, "ips": [], "python": host.python, "dir": host.dir, "rdma": []}
        for host in netns_session.hosts()
    ]
    path = tmp_path_factory.mktemp("hosts") / "hosts.json"
    path.write_text(json.dumps({"envs": [f"{k}={v}" for k, v in rank_env().items()], "hosts": rows}))
    return path


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Let MLX compile nothing: on a CPU it calls a compiler for each function of each shape."""
    import mlx.core as mx

    mx.disable_compile()
    yield
    mx.enable_compile()
