"""Killed, terminated or unplugged at random moments, `shard`, `deploy` and downloads finish at the next run.

By default one moment of a seeded schedule each way, `--kills N` for N of each verb and signal. What ended first is
told by the processes themselves (see `tests.support.crash`): at a change to a file, or at a time.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.crash import KILL, POWER, ROOT, TERM, Ended, Plan, Warm, clear_log, count_changes, lose
from tests.support.hub import Hub
from tests.support.sshd import Server
from tests.support.tiny import write_checkpoint, write_words

ENDED = (-9, 143)  # what a moectl that was itself ended leaves: a signal, or its code for SIGTERM


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int | None:
    count = request.config.getoption("--kills")
    assert count is None or isinstance(count, int)
    return count


@dataclass
class Trial:
    """One verb's run, undisturbed or ended at a moment; `tree` reads what it made."""

    warm: Warm
    directory: Path  # the log and what was said
    roots: tuple[Path, ...]  # in which files count
    argv: Callable[[], list[str]]
    tree: Callable[[], dict[str, bytes]]
    plan_file: Path | None = None  # for armed processes that others start
    env: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.directory / "changes.log"

    def run(
        self, at: int = 0, how: str = KILL, *, tear: float = 1.0, again: int = 0, kill_after_s: float | None = None
    ) -> Ended:
        plan = Plan(
            tuple(str(r.resolve()) for r in self.roots), str(self.log), at + self.done if at else 0, how, tear, again
        )
        if self.plan_file is not None:
            self.plan_file.write_text(plan.to_json())
        return self.warm.run(self.argv(), self.directory / "said", plan, env=self.env, kill_after_s=kill_after_s)

    @property
    def done(self) -> int:
        return count_changes(self.log)


@dataclass
class Score:
    """What a schedule came to."""

    runs: int = 0
    ended: int = 0  # runs that were ended in the middle
    lost: int = 0  # changes that power cuts undid


def survive(trial: Trial, whole: Trial, *, count: int, seed: int, ours: bool = True) -> None:
    """End `trial` `count` times each way; whenever it then may finish it has to come out as `whole` does at once."""
    begin = time.monotonic()
    done = whole.run()
    assert done.code == 0, done.said
    duration_s, changes, wanted = time.monotonic() - begin, whole.done, whole.tree()
    assert wanted
    for how in (KILL, TERM, POWER):
        begin = time.monotonic()
        draw = random.Random(f"{seed} {how}")
        score = _survive(trial, how, count, draw, wanted, changes, duration_s, ours)
        took_s = time.monotonic() - begin
        said = f"{how}: {score} in {took_s:.0f} s; undisturbed {changes} changes in {duration_s:.2f} s"
        sys.stdout.write(said + "\n")  # seen with -s


def _survive(
    trial: Trial,
    how: str,
    count: int,
    draw: random.Random,
    wanted: dict[str, bytes],
    changes: int,
    duration_s: float,
    ours: bool,  # to name, so that what has its name is whole and durable; the Hub's cache is not
) -> Score:
    score = Score()
    while score.ended < count:
        _forget(trial)
        for _ in range(draw.randint(1, 3)):
            score.runs += 1
            at, tear = draw.randint(1, changes), draw.choice([1.0, draw.random()])
            timed = how != POWER and draw.random() < 0.3
            after_s = draw.random() * duration_s if timed else None
            again = draw.choice([0, 0, 1, 2, 3])
            end = trial.run(0 if timed else at, how, tear=tear, again=again, kill_after_s=after_s)
            if end.code == 0:
                break
            score.ended += 1
            if how == POWER:
                score.lost += lose(trial.log, trial.roots, draw)
            if ours:
                assert_nothing_half(trial.tree(), wanted)
        final = trial.run()
        assert final.code == 0, final.said
        assert trial.tree() == wanted
        if ours:
            left = (p for root in trial.roots for p in root.rglob("*") if ".lost-" not in str(p))
            assert [p for p in left if p.suffix in (".partial", ".tmp")] == []
        if how == POWER:
            score.lost += lose(trial.log, trial.roots, draw)
            if not ours:
                assert trial.run().code == 0
            assert trial.tree() == wanted
    return score


def _forget(trial: Trial) -> None:
    clear_log(trial.log)
    for root in trial.roots:
        for path in sorted(root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def assert_nothing_half(there: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    for name, data in there.items():
        assert name in wanted, f"{name} is there, and should not be"
        assert data == wanted[name], f"{name} is there, and not as it should be"


def visible(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory that has its final name."""
    found = (p for p in directory.rglob("*") if p.is_file())
    return {
        p.relative_to(directory).as_posix(): p.read_bytes()
        for p in found
        if not p.name.startswith(".") and p.suffix != ".partial" and ".lost-" not in str(p)
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return write_words(write_checkpoint(directory, files=3, n_experts=4, top_k=2, ffn_hidden=128))


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    process = Warm((), {})
    yield process
    process.close()


@pytest.fixture(scope="module")
def warm_ssh() -> Iterator[Warm]:
    process = Warm(("moectl.cluster.deploy.deploy", "moectl.planner.questions", "moectl.hosts.ssh.remote"), {})
    yield process
    process.close()


def test_shard_survives(warm: Warm, model: Path, tmp_path: Path, kills: int | None) -> None:
    def make(name: str) -> Trial:
        root = tmp_path / name / "sets"
        root.mkdir(parents=True)
        out = root / "out"
        words = ["shard", str(model), "--nodes", "2", "--q-bits", "4", "-o", str(out), "-j", "2", "--quiet"]
        return Trial(warm, root.parent, (root,), lambda: words, lambda: visible(out))

    survive(make("cut"), make("whole"), count=kills or 1, seed=5)


# deploy: the operator's process, or the one on the host, whichever makes the change that is the moment.


def make_python(directory: Path, plan_file: Path) -> Path:
    """Make an interpreter with this one's packages, whose every process counts its changes if there is a plan."""
    env = directory / "armed-env"
    packages = env / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    packages.mkdir(parents=True)
    (env / "bin").mkdir()
    python = env / "bin" / "python"
    python.symlink_to(Path(sys.executable).resolve())
    (env / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    here = [p for p in sys.path if p.endswith("site-packages")]
    arming = f"import tests.support.crash; tests.support.crash.arm_from({str(plan_file)!r})"
    (packages / "armed.pth").write_text("\n".join([str(ROOT), *here, arming]) + "\n")
    return python


def test_deploy_survives(warm_ssh: Warm, model: Path, sshd: Server, tmp_path: Path, kills: int | None) -> None:
    shards = tmp_path / "set"
    done = warm_ssh.run(
        ["shard", str(model), "--nodes", "1", "-o", str(shards), "--quiet"],
        tmp_path / "said",
        Plan((), str(tmp_path / "log")),
    )
    assert done.code == 0, done.said
    sshd.add_alias("survivor")

    def make(name: str) -> Trial:
        base = tmp_path / name
        nodes, state, plan_file = base / "nodes", base / "state", base / "plan.json"
        nodes.mkdir(parents=True)
        state.mkdir()
        python = make_python(base, plan_file)
        (base / "hosts.txt").write_text(f"survivor python={python} dir={nodes} memory=64GB chip=m4-max\n")
        words = ["deploy", str(base / "hosts.txt"), "--shards", str(shards), "--quiet"]
        env = {"XDG_STATE_HOME": str(state)}

        def tree() -> dict[str, bytes]:
            # The operator's note names paths, which are the trial's own.
            record = state / "moectl" / "deployment.json"
            note = {"deployment": record.read_bytes().replace(name.encode(), b"NAME")} if record.exists() else {}
            return visible(nodes) | note

        return Trial(warm_ssh, base, (nodes, state), lambda: words, tree, plan_file, env)

    survive(make("pushed"), make("whole"), count=kills or 1, seed=5)


# Downloads: into the Hugging Face cache by `pull`, beside the output by `shard`.


@pytest.fixture(scope="module")
def hub(model: Path) -> Iterator[Hub]:
    server = Hub()
    server.add("dbrx/tiny", model)
    yield server
    server.close()


@pytest.fixture(scope="module")
def warm_hub(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    home = str(tmp_path_factory.mktemp("hf-home"))
    imports = ("moectl.shards.source.checkpoint", "huggingface_hub.file_download", "huggingface_hub.hf_api")
    process = Warm(imports, {"HF_ENDPOINT": hub.endpoint, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"})
    yield process
    process.close()


def test_pull_survives(warm_hub: Warm, model: Path, tmp_path: Path, kills: int | None) -> None:
    def make(name: str) -> Trial:
        cache = tmp_path / name / "hub"
        cache.mkdir(parents=True)

        def tree() -> dict[str, bytes]:
            found = [p for p in cache.glob("models--*/snapshots/*/*") if p.is_file()]
            return {p.name: p.read_bytes() for p in found}

        words = ["pull", "dbrx/tiny", "--quiet"]
        return Trial(warm_hub, cache.parent, (cache,), lambda: words, tree, env={"HF_HUB_CACHE": str(cache)})

    whole = make("whole")
    survive(make("pulled"), whole, count=kills or 1, seed=5, ours=False)
    source = {p.name: p.read_bytes() for p in model.iterdir()}
    assert whole.tree() == {name: source[name] for name in whole.tree()}


@pytest.mark.long
def test_shard_of_a_download_survives(warm_hub: Warm, tmp_path: Path, kills: int | None) -> None:
    def make(name: str) -> Trial:
        root = tmp_path / name / "files"
        root.mkdir(parents=True)
        out = root / "out"
        words = ["shard", "dbrx/tiny", "--nodes", "2", "--q-bits", "4", "-o", str(out), "--quiet"]
        return Trial(
            warm_hub, root.parent, (root,), lambda: words, lambda: visible(out), env={"HF_HUB_CACHE": str(root / "hub")}
        )

    survive(make("cut"), make("whole"), count=kills or 1, seed=5)
