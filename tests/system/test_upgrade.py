"""`moectl upgrade` with a real pip and an index that is a directory; and of hosts behind a real sshd."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import moectl
from moectl import __main__
from moectl.cluster.deploy import upgrade as hosts_upgrade
from moectl.cluster.deploy.wheel import pack_wheel, write_wheel
from moectl.session.deployment import DeployedRank, Deployment, find_deployment, write_deployment
from tests.cluster.test_deploy import make_hosts, make_wheelhouse
from tests.cluster.test_status import run_worker
from tests.support.sshd import Server

NEWER = "99.0.0"
Call = Callable[..., tuple[int, str, str]]


def make_newer(packed: Path, directory: Path, version: str = NEWER) -> Path:
    """Write the wheel of another version of this moectl."""
    old, new = moectl.__version__.encode(), version.encode()
    with zipfile.ZipFile(packed) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}
    files["moectl/__init__.py"] = files["moectl/__init__.py"].replace(old, new)
    info, before = f"moectl-{version}.dist-info", f"moectl-{moectl.__version__}.dist-info"
    files = {name.replace(before, info): data for name, data in files.items()}
    files[f"{info}/METADATA"] = files[f"{info}/METADATA"].replace(b"Version: " + old, b"Version: " + new)
    path = directory / f"moectl-{version}-py3-none-any.whl"
    write_wheel(path, info, files)
    return path


def test_this_machine_is_upgraded_by_pip_and_goes_on_as_the_new_one(tmp_path: Path) -> None:
    index, venv = tmp_path / "index", tmp_path / "venv"
    index.mkdir()
    packed = pack_wheel(index)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    [site] = venv.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(venv / "bin" / "python")
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}

    def run(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [python, *words],
            cwd=tmp_path,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done

    run("-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", "moectl")
    upgrade = ("-m", "moectl", "upgrade")
    assert run(*upgrade, "--check").stdout == f"moectl {moectl.__version__} is the newest.\n"
    newer = make_newer(packed, index)
    assert run(*upgrade, "--check").stdout == f"moectl {NEWER} is there: moectl upgrade\n"
    assert json.loads(run(*upgrade, "--check", "--json").stdout)["newer"] == NEWER
    shown = run(*upgrade, "--dry-run").stdout
    assert f"this machine  {moectl.__version__} → {NEWER}: {python} -m pip install" in shown
    assert run("-m", "moectl", "version", "-q").stdout.startswith(f"moectl {moectl.__version__}\n")
    done = run(*upgrade)
    assert done.stdout == f"this machine  {moectl.__version__} → {NEWER}\n"
    assert f"This machine has moectl {NEWER} now." in done.stderr
    assert run("-m", "moectl", "version").stdout.startswith(f"moectl {NEWER}\n")
    assert run(*upgrade).stdout == f"this machine  {NEWER}, as before\n"
    newer.write_bytes(b"not a wheel")  # a download that broke off: what is there stays
    newer.rename(index / "moectl-99.0.1-py3-none-any.whl")
    assert "could not look for a newer moectl" in run(*upgrade, code=6).stderr
    assert run("-m", "moectl", "version").stdout.startswith(f"moectl {NEWER}\n")
    run("-m", "pip", "install", "-q", f"moectl=={moectl.__version__}")  # the hint where a new one does not start
    assert run("-m", "moectl", "version").stdout.startswith(f"moectl {moectl.__version__}\n")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Run the command line in this process, without a terminal; return exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moectl", "upgrade", *words])
        code = __main__.run()
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_hosts_get_this_machines_version_and_one_that_fails_is_told(
    sshd: Server, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack_wheel(tmp_path)  # one for the whole test, also when someone edits the source tree
    monkeypatch.setattr(hosts_upgrade, "pack_wheel", lambda directory: packed)
    base = sysconfig.get_config_var("BINDIR") + "/python3"
    house = str(make_wheelhouse(tmp_path / "wheels"))
    host = replace(make_hosts(sshd, tmp_path, 1)[0], python=None)
    gone = sshd.add_alias("gone", port=1)
    root = str(tmp_path / "node0")
    (tmp_path / "hosts.txt").write_text(f"{host.name} dir={root} python={base}\n{gone}\n")
    ranks = (DeployedRank(replace(host, python=base), base, root, f"{root}/shards/x"), DeployedRank(host))
    write_deployment(Deployment("x", "shards", ranks))

    words = ("hosts.txt", "--hosts-only", "--wheelhouse", house)
    code, out, _ = call(*words, "--dry-run")
    assert (code, "Dry run: nothing was changed." in out, (tmp_path / "node0").exists()) == (3, True, False)
    code, out, err = call(*words)
    assert code == 3
    assert f"this machine  {moectl.__version__}, as before\n" in out
    assert f"node0  ok      nothing → {moectl.__version__}\n" in out
    assert "gone   failed  " in out
    assert "1 of 2 hosts failed: gone." in err
    deployed = find_deployment()
    assert deployed is not None
    python = f"{root}/env/bin/python"
    assert [rank.python for rank in deployed.ranks] == [python, ""]

    (tmp_path / "hosts.txt").write_text(f"{host.name} dir={root}\n")
    code, out, _ = call(*words, "--json")
    [told] = json.loads(out)["hosts"]
    assert (code, told["ok"], told["changed"], told["before"]) == (0, True, False, moectl.__version__)
    stamp = tmp_path / "node0/env/moectl-env.json"
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "wheel": "of yesterday"}))

    # A worker of another machine runs there: that host is left as it is, until the worker has ended.
    with run_worker(tmp_path / "node0/logs/x-rank-0.log"):
        code, _, err = call(*words)
        assert (code, "a worker runs there" in err) == (8, True)
        assert json.loads(stamp.read_text())["wheel"] == "of yesterday"
    assert call(*words)[1].endswith(f"node0  ok      {moectl.__version__}, other files\n")
    assert json.loads(stamp.read_text())["wheel"] != "of yesterday"


def test_a_model_that_runs_is_stopped_only_when_allowed(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from moectl.cli.verbs import upgrade as verb

    done: list[str] = []
    one = hosts_upgrade.Upgraded("mac1", "0.0.9", moectl.__version__, True)

    def run_hosts(*_: object, dry_run: bool, **__: object) -> list[hosts_upgrade.Upgraded]:
        done.append("look" if dry_run else "upgrade")
        return [one]

    monkeypatch.setattr("moectl.server.client.find_running", lambda: [Path("/run/a.sock")])
    monkeypatch.setattr("moectl.server.client.Client.stop", lambda client, grace_s: done.append(f"stop {client.path}"))
    monkeypatch.setattr(verb, "_run_hosts", run_hosts)
    code, out, err = call("--hosts-only", "--hosts", "mac1")
    assert (code, out, done) == (8, "", ["look"])
    assert "Hint: moectl stop before it, or --restart" in err
    done.clear()
    code, out, err = call("--hosts-only", "--hosts", "mac1", "--restart")
    assert (code, done) == (0, ["look", "stop /run/a.sock", "upgrade"])
    assert f"mac1  ok      0.0.9 → {moectl.__version__}\n" in out
    assert "What runs is not started again by itself: it was not the service." in err


def test_an_editable_moectl_is_refused_and_its_hosts_are_not(call: Call) -> None:
    """The moectl under test is one; with what its hint says at the end, the hosts go on."""
    code, _, err = call()
    assert (code, "this moectl is an editable installation of" in err) == (8, True)
    assert ", then moectl upgrade --hosts-only" in err
    assert call("--hosts-only")[:2] == (0, f"this machine  {moectl.__version__}, as before\n")
    assert call("--check", "--restart")[0] == 2
