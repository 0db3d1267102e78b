"""The hosts of the first hour, ready to be measured: connections, what each host is, and sessions that can be ended.

A step gets its sessions here, so that one that takes too long, or Ctrl-C, ends the workers that it has started.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moectl.cluster import probe
from moectl.cluster.first_hour.scrub import Scrubber, spell_out
from moectl.cluster.probe import Site
from moectl.engine.environment import keep_awake
from moectl.engine.exchange_times import ExchangeJob
from moectl.engine.protocol import Done, RunOptions
from moectl.engine.random_prompts import RandomPrompts
from moectl.engine.request import Request, Stats
from moectl.errors import CommandFailed
from moectl.hosts.connect import map_at_once
from moectl.hosts.onhost.prelude import parse_answer
from moectl.hosts.survey import Survey, survey_host
from moectl.planner.measured import Job, Speed
from moectl.records import build
from moectl.session.backend import choose_backend
from moectl.session.deployment import Deployment
from moectl.session.session import RankSpec, Session
from moectl.session.target import Target, list_ranks, open_session
from moectl.text import last_line

FACTS = ("-m", "moectl.engine.facts")
EXCHANGE_TIMES = ("-m", "moectl.engine.exchange_times")
FACTS_S = 60.0
START_S = 60.0
QUICK = 1 / 200  # of each time that a step spends on waiting and measuring
_PROMPT_TOKENS = 64
Log = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Facts:
    """What `engine.facts` says of one environment."""

    versions: Mapping[str, str]
    machine: str
    macos: str
    wheel: str
    backends: tuple[str, ...]
    metal: bool
    gpu: bool
    working_set_bytes: int | None
    private: tuple[str, ...]  # never told


@dataclass(slots=True)
class Stage:
    """All ranks of a target; `facts` and `surveys` are in rank order."""

    target: Target
    ranks: Sequence[RankSpec]
    surveys: Sequence[Survey]
    facts: Sequence[Facts]
    quick: bool = False
    on_log: Log = lambda host, line: None
    is_late: bool = False  # the step took too long, and was ended
    _session: Session | None = field(default=None, init=False)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.ranks)

    @property
    def macs(self) -> list[int]:
        """One rank of each host that is a Mac."""
        first = {spec.host.address: rank for rank, spec in reversed(list(enumerate(self.ranks)))}
        return sorted(rank for rank in first.values() if self.surveys[rank].is_mac)

    @property
    def has_gpu(self) -> bool:
        """Whether every rank computes on a GPU."""
        return all(facts.gpu for facts in self.facts)

    @property
    def dtype(self) -> str:
        """The numbers that ranks exchange here."""
        return "bfloat16" if self.has_gpu else "float32"

    @property
    def doubt(self) -> str:
        """Why what is measured here does not show how Macs behave; "" where it does."""
        if not self.has_gpu:
            return "measured without a GPU"
        return "measured with --quick" if self.quick else ""

    def scale(self, seconds: float) -> float:
        """Return the time that a step waits or measures where a whole hour is given for `seconds`."""
        return seconds * QUICK if self.quick else seconds

    # Sessions.

    @contextlib.contextmanager
    def open_workers(self, *, load_timeout_s: float = 600.0, **options: Any) -> Iterator[Session]:
        """Run the target's own workers with these run options."""
        wanted = RunOptions(start_timeout_s=START_S, **options)
        remotes = [spec.remote for spec in self.ranks]
        with open_session(
            self.target,
            wanted,
            remotes=remotes,
            on_made=self._hold,
            load_timeout_s=load_timeout_s,
            on_log=self.on_log,
        ) as session:
            yield session

    @contextlib.contextmanager
    def open_exchanges(self, backend: str) -> Iterator[Session]:
        """Run workers without a model that time exchanges over a backend. Raises HostsError where it cannot work."""
        chosen = choose_backend(backend, [spec.host for spec in self.ranks])
        specs = [replace(spec, argv=(spec.argv[0], *EXCHANGE_TIMES), shards="", log=None) for spec in self.ranks]
        made = Session(specs, RunOptions(start_timeout_s=START_S), backend=chosen, on_log=self.on_log)
        self._hold(made)
        with made as session:
            yield session

    def measure_speed(
        self, job: Job, *, env: Mapping[str, str] | None = None, backend: str | None = None
    ) -> tuple[Speed, ...]:
        """Run a job of `engine.measure` on all ranks, with more variables or another backend than usual."""
        sites = [
            Site(spec.host, spec.remote, spec.argv[0], spec.addresses, {**spec.env, **(env or {})})
            for spec in self.ranks
        ]
        chosen = backend or self.choose_backend()
        return probe.measure_speed(
            sites, job, backend=chosen, start_timeout_s=START_S, on_log=self.on_log, on_made=self._hold
        )

    def choose_backend(self) -> str:
        """Return the backend that the target's workers use."""
        wanted = self.target.backend if isinstance(self.target, Deployment) else "auto"
        return choose_backend(wanted, [spec.host for spec in self.ranks])

    def memory_to_use(self) -> int:
        """Return the bytes that a rank's weights may take in a measurement."""
        each = [spec.host.address for spec in self.ranks]
        return probe.memory_to_use([survey.hardware for survey in self.surveys]) // max(map(each.count, each))

    def _hold(self, session: Session) -> None:
        self._session = session
        if self.is_late:
            session.close()

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """End the sessions of a step that takes longer than this."""
        self.is_late = False

        def end() -> None:
            self.is_late = True
            if self._session is not None:
                self._session.close()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self._session = None

    # Hosts.

    def ask_macs(self, *argv: str) -> dict[int, str]:
        """Return what a tool of macOS prints, by a rank on each Mac."""
        macs = self.macs
        done = map_at_once(lambda rank: self.ranks[rank].remote.run(argv, timeout_s=20.0, check=False), macs)
        return {rank: one.stdout.decode("utf-8", "replace") for rank, one in zip(macs, done, strict=True)}

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)

    def make_scrubber(self) -> Scrubber:
        """Return what takes the names of these hosts, of their users and of this machine out of a text."""
        names = {socket.gethostname(), getpass.getuser(), str(Path.home()), self.target.name, self.target.shards}
        for spec, facts in zip(self.ranks, self.facts, strict=True):
            host = spec.host
            names |= {host.address, host.user or "", host.dir or "", host.python or "", spec.argv[0], spec.shards}
            names |= {*host.ips, *spec.addresses, *facts.private} | spell_out(host.name)
            names |= {word for name in facts.private for word in spell_out(name)}
        if isinstance(self.target, Deployment):
            names |= {rank.root for rank in self.target.ranks}
        return Scrubber(names - {"localhost"})


@contextlib.contextmanager
def open_stage(target: Target, *, quick: bool, on_log: Log = lambda host, line: None) -> Iterator[Stage]:
    """Connect to a target's hosts and ask what they are. Raises the first host's error."""
    keep_awake()  # some steps start ranks without `open_session`
    with contextlib.ExitStack() as held:
        ranks = list_ranks(target, held)
        surveys = map_at_once(lambda spec: survey_host(spec.remote), ranks)
        facts = map_at_once(_ask_facts, ranks)
        yield Stage(target, ranks, surveys, facts, quick, on_log)


def _ask_facts(spec: RankSpec) -> Facts:
    done = spec.remote.run([spec.argv[0], *FACTS], timeout_s=FACTS_S, check=False)
    for line in done.stdout.split(b"\n"):
        answer = parse_answer(line)
        if answer is not None:
            with contextlib.suppress(ValueError):
                return build(Facts, answer)
    said = last_line(done.stderr) or f"exit code {done.code}"
    raise CommandFailed(
        f"its environment did not say what MLX can do there: {said}", host=spec.host.name, hint="moectl deploy"
    )


def answer(session: Session, number: int, *, tokens: int = 2) -> Stats:
    """Let a session answer a random prompt, its `number`th request; return the statistics."""
    model = session.model
    count = min(_PROMPT_TOKENS, model.max_seq_len // 2)
    prompt = RandomPrompts(model.vocab_size, number).draw(count)
    request = Request(number, "", tokens, prompt_tokens=prompt, ignore_eos=True, cache_prompt=False)
    *_, done = session.generate(request)
    assert isinstance(done, Done)
    return done.stats


def time_exchange(session: Session, number: int, job: ExchangeJob) -> dict[str, float]:
    """Return the seconds of an exchange, by way, as a session of `open_exchanges` measures it in its `number`th job."""
    *_, done = session.generate(Request(number, json.dumps(asdict(job)), 1))
    assert isinstance(done, Done)
    found: dict[str, float] = json.loads(done.rest)
    return found
