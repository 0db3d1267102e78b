"""uninstall over real sshd: what moectl put on a host goes, what somebody else put there stays and is named."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moectl.cluster.deploy.deploy import deploy
from moectl.cluster.deploy.uninstall import FRAMEWORK, _is_under, clear_hosts
from moectl.errors import StateError
from moectl.hosts.hostfile import Host
from moectl.hosts.onhost import workers
from moectl.hosts.onhost.clear import Removals, is_our_env, remove
from moectl.hosts.onhost.files import MADE, RECORD
from moectl.model.manifest import NAME as MANIFEST_NAME
from moectl.paths import data_dir
from moectl.session.deployment import DeployedRank, Deployment, find_deployment, write_deployment
from tests.cli.test_cli import run
from tests.cluster.test_deploy import make_shards
from tests.cluster.test_status import run_worker
from tests.support.running import make_python
from tests.support.sshd import Server, find_free_port


def read_tree(root: Path) -> dict[str, bytes | str | None]:
    """Return everything under a directory: contents of files, targets of links, None for directories."""
    return {
        path.relative_to(root).as_posix(): str(path.readlink())
        if path.is_symlink()
        else None
        if path.is_dir()
        else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


def make_env(root: Path) -> Path:
    """Make an environment as `deploy` does, pip aside."""
    env = root / "env"
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(env)], check=True)
    package = env / "lib" / "python" / "site-packages" / "mlx"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    (env / "moectl-env.json").write_text("{}")
    (root / "env.lock").touch()
    wheels = root / "wheels"
    wheels.mkdir()
    for name in ("moectl-0.1.0-py3-none-any.whl", "mlx-1-py3-none-any.whl", "requirements.txt"):
        (wheels / name).write_text(name)
    (wheels / ".moectl-verified.json").write_text(json.dumps({"mlx-1-py3-none-any.whl": [1, 2, "x"]}))
    logs = root / "logs"
    logs.mkdir()
    for name in ("tiny-rank-0.log", "tiny-rank-0.log.1", "other-set-rank-11.log"):
        (logs / name).write_text("said\n")
    return env


@pytest.fixture
def hosts(sshd: Server, tmp_path: Path) -> list[Host]:
    """Two hosts; the homes of both hold something of their owner's, one of them inside moectl's directory too."""
    python = str(make_python(tmp_path / "python"))
    found = [
        Host(sshd.add_alias(f"node{i}"), python=python, dir=str(tmp_path / f"home{i}" / "moectl")) for i in range(2)
    ]
    for i in range(2):
        (tmp_path / f"home{i}").mkdir()
        (tmp_path / f"home{i}" / "thesis.txt").write_text("mine\n")
    return found


def note_root(root: Path) -> None:
    """Note, as `deploy` does, that the root was not there before."""
    (root / MADE).write_text(str(root.parent))


def install(hosts: list[Host], shards: Path) -> None:
    deploy(hosts, shards, make_shards(shards, len(hosts))).raise_failures()
    for host in hosts:
        make_env(Path(str(host.dir)))


def plant(hosts: list[Host], shards: Path) -> None:
    """Leave on hosts of this machine what `install` would, sooner."""
    manifest, ranks = make_shards(shards, len(hosts)), []
    for rank, host in enumerate(hosts):
        root = Path(str(host.dir))
        directory = root / "shards" / shards.name
        for name in (*manifest.files_of(rank), MANIFEST_NAME):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(shards / name, directory / name)
        (directory / RECORD).write_text("{}")
        note_root(root)
        make_env(root)
        ranks.append(DeployedRank(host, sys.executable, str(root), str(directory)))
    write_deployment(Deployment(shards.name, str(shards), tuple(ranks)))


def test_hosts_are_as_they_were_before(hosts: list[Host], tmp_path: Path) -> None:
    homes = [tmp_path / "home0", tmp_path / "home1"]
    # What dir= names, deploy makes on one, and with it what is above; the other has it already, from its owner.
    hosts[0] = replace(hosts[0], dir=str(homes[0] / "fast" / "disk" / "moectl"))
    Path(str(hosts[1].dir)).mkdir()
    before = [read_tree(home) for home in homes]
    shards = tmp_path / "tiny-experts-2"
    install(hosts, shards)
    installed = [read_tree(home) for home in homes]
    looked = clear_hosts(hosts, dry_run=True)
    assert [read_tree(home) for home in homes] == installed
    assert find_deployment() is not None
    for number, found in enumerate(looked):
        assert found.root == hosts[number].dir
        assert set(found.items) == {"env", "env.lock", "logs", "shards/tiny-experts-2", "wheels"}
        assert found.items["shards/tiny-experts-2"] > 800_000
        assert found.left == ()
    assert [one.items for one in clear_hosts(hosts, dry_run=False)] == [one.items for one in looked]
    assert [read_tree(home) for home in homes] == before
    assert find_deployment() is None
    again = clear_hosts(hosts, dry_run=False)  # nothing is there: that is all right
    assert [(one.error, one.items) for one in again] == [(None, {}), (None, {})]
    assert (shards / MANIFEST_NAME).exists()


def test_what_is_not_moectls_is_left_and_named(hosts: list[Host], tmp_path: Path) -> None:
    plant(hosts[:1], tmp_path / "tiny-experts-1")
    root = Path(str(hosts[0].dir))
    foreign = [
        "notes.txt",
        "env/todo.txt",
        "logs/mine.log",
        "shards/README",
        "shards/tiny-experts-1/common/mine.safetensors",
        "shards/tiny-experts-1/own/deep.txt",
        "wheels/other-1-py3-none-any.whl",
        "shards/model/weights.bin",
        "shards/model/config.json",  # a checkpoint of somebody's own
        "shards/model/tokenizer.json",
    ]
    for name in foreign:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "link").symlink_to(tmp_path)
    (root / "shards" / "elsewhere").symlink_to(tmp_path)
    (root / "logs" / ".DS_Store").write_text("Finder")
    found = clear_hosts(hosts[:1], dry_run=False)[0]
    kept = [*foreign, "link", "shards/elsewhere"]
    assert set(found.left) == {str(root / name) for name in kept}
    there = {name for name, content in read_tree(root).items() if content is not None}
    assert there == {*kept, "logs/.DS_Store"}
    # Once the owner has taken theirs away, the rest goes too.
    for name in kept:
        (root / name).unlink()
    for name in ("shards/tiny-experts-1/own", "shards/model"):
        (root / name).rmdir()
    clear_hosts(hosts[:1], dry_run=False)
    assert read_tree(root) == {}  # it was its owner's for a while


def test_an_interrupted_deploy_is_cleared_too(hosts: list[Host], tmp_path: Path) -> None:
    plant(hosts[:1], tmp_path / "tiny-experts-1")
    root = Path(str(hosts[0].dir))
    directory = root / "shards" / "tiny-experts-1"
    (directory / MANIFEST_NAME).unlink()
    (directory / ".moectl-verified.json").unlink()
    (directory / "rank-0" / "layer-002.safetensors.partial").write_text("half")
    (directory / ".moectl-verified.json.123.tmp").write_text("{}")
    (root / "env" / "moectl-env.json").unlink()  # as while pip works
    assert clear_hosts(hosts[:1], dry_run=False)[0].left == ()
    assert not root.exists()


def test_a_note_of_the_root_removes_no_more_than_it_says(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    for said, gone in ((str(tmp_path / "a"), [root]), ("/", [root, tmp_path / "a"]), ("elsewhere", []), ("", [])):
        root.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine").touch()
        (root / MADE).write_text(said)
        assert remove(Removals(str(root), [])) == []
        assert [path for path in (root, tmp_path / "a") if not path.exists()] == gone
        assert not (root / MADE).exists()


def test_another_environment_is_not_moectls(tmp_path: Path) -> None:
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    assert not is_our_env(str(env))
    assert Removals(str(tmp_path), []).left == [str(env)]
    assert Removals(str(tmp_path / "none"), []).left == []


def test_a_host_where_a_worker_runs_is_left_as_it_is(hosts: list[Host], tmp_path: Path) -> None:
    plant(hosts, tmp_path / "tiny-experts-2")
    root = Path(str(hosts[0].dir))
    with run_worker(root / "logs" / "tiny-rank-0.log"):
        before = read_tree(root)
        first, second = clear_hosts(hosts, dry_run=False)
    assert isinstance(first.error, StateError)
    assert "a worker runs there" in first.error.message
    assert read_tree(root) == before
    assert second.error is None
    assert not Path(str(hosts[1].dir)).exists()
    left = find_deployment()
    assert left is not None
    assert left.missing == ("node1",)


def test_a_worker_is_known_by_its_lock_whatever_ps_calls_it(tmp_path: Path) -> None:
    """As where the python of a framework starts another program than the environment's."""
    root, other = tmp_path / "a[b]", tmp_path / "other"
    logs = [place / "logs" / "tiny-rank-0.log" for place in (root, root, other)]
    mark = (
        "import sys; from moectl.hosts.onhost.workers import mark_running; mark_running(sys.argv[1]); print(); input()"
    )
    running = []
    for log in logs:
        log.parent.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-c", mark, str(log)]
        running.append(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    for process in running:
        assert process.stdout is not None
        process.stdout.readline()
    seen = workers.find_workers(str(root))
    found = {worker["pid"]: worker["logs"] for worker in seen if worker["pid"] in {one.pid for one in running}}
    assert found == {running[0].pid: [str(logs[0])], running[1].pid: [str(logs[0])]}
    for process in running:
        process.communicate(b"\n")
    assert workers.read_marks(str(root)) == {}
    assert workers.LOCK in "".join(Removals(str(root), []).files)  # and uninstall takes it along


@pytest.mark.parametrize("is_its_own", [True, False])
def test_a_worker_that_keeps_no_log_may_be_any_roots_of_its_python(
    hosts: list[Host], tmp_path: Path, is_its_own: bool
) -> None:
    plant(hosts[:1], tmp_path / "tiny-experts-1")
    python = str(hosts[0].python) if is_its_own else sys.executable
    with subprocess.Popen([python, "-c", "input()", "-m", "moectl", "worker"], stdin=subprocess.PIPE) as process:
        [found] = clear_hosts(hosts[:1], dry_run=True)
        process.communicate(b"\n")
    said = found.error.message if found.error else ""
    assert (f"process {process.pid}" in said) == is_its_own


@pytest.mark.parametrize(
    ("python", "logs", "own", "is_ours"),
    [
        ("/usr/bin/python3", [], True, True),  # it could be
        ("/home/eve/.moectl/env/bin/python", [], False, False),  # whose files cannot be seen
        ("/home/ada/.moectl/env/bin/python", [], False, True),
        ("python3", ["/home/ada/.moectl/logs/x-rank-0.log"], True, True),
        ("/usr/bin/python3", ["/home/ada/.moectl2/logs/x-rank-0.log"], True, False),
        ("/opt/homebrew/Frameworks/Python.framework/Versions/3.12" + FRAMEWORK, [], True, True),
        ("/opt/homebrew/Frameworks/Python.framework/Versions/3.12" + FRAMEWORK, [], False, False),
    ],
)
def test_whose_worker_it_is(python: str, logs: list[str], own: bool, is_ours: bool) -> None:
    assert _is_under({"python": python, "logs": logs, "own": own}, "/home/ada/.moectl", ["/usr/bin/python3"]) == is_ours


@pytest.mark.skipif(os.getuid() != 0, reason="needs two users")
def test_another_users_worker_is_no_own_one(tmp_path: Path) -> None:
    with run_worker(tmp_path / "logs" / "x-rank-0.log") as pid:
        assert workers._is_own(pid)
        with subprocess.Popen(["sleep", "60"], user=65534) as other:
            assert not workers._is_own(other.pid)
            other.kill()
    assert workers._is_own(1 << 22)  # it has ended


@pytest.mark.parametrize("locked", ["env.lock", "shards/tiny-experts-1/config.json.partial"])
def test_a_deploy_at_work_is_not_disturbed(locked: str, hosts: list[Host], tmp_path: Path) -> None:
    plant(hosts[:1], tmp_path / "tiny-experts-1")
    root = Path(str(hosts[0].dir))
    with (root / locked).open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        before = read_tree(root)
        error = clear_hosts(hosts[:1], dry_run=False)[0].error
        assert isinstance(error, StateError)
        assert "is locked" in error.message
        assert read_tree(root) == before


def test_this_machines_own_shard_sets_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A localhost whose dir= is where the operator keeps the sets: what is deployed there is the operator's copy."""
    monkeypatch.setattr(sys, "executable", str(make_python(tmp_path / "python")))
    shards = data_dir() / "shards" / "tiny-experts-1"
    manifest = make_shards(shards, 1)
    host = Host("localhost", dir=str(data_dir()))
    found = clear_hosts([host], dry_run=False)[0]
    assert found.left == (str(shards),)
    assert (shards / MANIFEST_NAME).exists()
    elsewhere = Host("localhost", dir=str(tmp_path / "root"))
    for name in (*manifest.files, MANIFEST_NAME):  # as `deploy` does here: the other name stays
        path = tmp_path / "root" / "shards" / shards.name / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(shards / name)
    note_root(tmp_path / "root")
    assert clear_hosts([elsewhere], dry_run=False)[0].left == ()
    assert not (tmp_path / "root").exists()
    assert all((shards / name).exists() for name in manifest.files)


def test_what_the_disk_refuses_is_told_and_the_rest_goes(tmp_path: Path) -> None:
    make_env(tmp_path / "root")
    note_root(tmp_path / "root")
    plan = Removals(str(tmp_path / "root"), [])
    (tmp_path / "stuck").mkdir()
    plan.files.insert(0, str(tmp_path / "stuck"))  # what is a directory by now cannot be unlinked, by root neither
    assert [line.split(":")[0] for line in remove(plan)] == [str(tmp_path / "stuck")]
    assert not (tmp_path / "root").exists()


def test_uninstall_as_a_user_types_it(
    sshd: Server, hosts: list[Host], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(hosts, tmp_path / "tiny-experts-2")
    (Path(str(hosts[0].dir)) / "notes.txt").write_text("mine")
    file = tmp_path / "hosts.txt"
    file.write_text("\n".join(f"{host.name} python={host.python} dir={host.dir}" for host in hosts))
    code, out, _ = run(capsys, monkeypatch, "uninstall", str(file), "-n")
    assert code == 0
    assert "would go: shards/tiny-experts-2 (1.0 MB)" in out
    code, out, _ = run(capsys, monkeypatch, "uninstall", "--hosts", "node0,node1", "-n", "--json")
    assert (code, [row["root"] for row in json.loads(out)["hosts"]]) == (0, [host.dir for host in hosts])
    code, _, err = run(capsys, monkeypatch, "uninstall", str(file))
    assert code == 2
    assert "use --yes to skip confirmation" in err
    code, out, _ = run(capsys, monkeypatch, "uninstall", str(file), "-y")
    assert code == 0
    assert out.splitlines()[1] == f"       left: {hosts[0].dir}/notes.txt is not moectl's"
    with file.open("a") as f:
        f.write(f"\n{sshd.add_alias('dead', f'Port {find_free_port()}')}\n")
    code, out, _ = run(capsys, monkeypatch, "uninstall", str(file), "--json")  # nothing to remove: nothing to ask
    assert code == 3
    document = json.loads(out)
    assert document["schema"] == "moectl.uninstall/1"
    assert [(row["host"], row["ok"], row["bytes"]) for row in document["hosts"]] == [
        ("node0", True, 0),
        ("node1", True, 0),
        ("dead", False, 0),
    ]
