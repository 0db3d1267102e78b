"""The process on a node, one per rank: it holds a leash (stdin/stdout), a part of the model, and nothing else.

It opens no port of its own but the data plane's, writes no file but its log, and ends with its leash: end of file,
silence, or an error anywhere ends the process at once, because after a broken collective no call into the backend can
be trusted to return.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.metadata
import logging
import os
import platform
import queue
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from moectl import __version__, errors
from moectl.engine.isolation import BACKEND_ERRORS, isolated
from moectl.engine.protocol import (
    BEAT_S,
    LEASH_LOST,
    MAX_LINE_BYTES,
    SILENCE_S,
    Alive,
    AllGather,
    Beat,
    Connect,
    Connected,
    Connecting,
    Done,
    Event,
    Fatal,
    Gathered,
    Listening,
    Load,
    Loaded,
    Order,
    Prefilled,
    Ready,
    Refused,
    Start,
    Token,
    decode,
    encode,
)
from moectl.errors import MoectlError, to_json
from moectl.shards.hub_environment import HUB_VARIABLES

if TYPE_CHECKING:
    from moectl.engine.engine import Engine
    from moectl.model.manifest import Manifest

_FORMAT = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S%z")
_log = logging.getLogger("moectl.worker")


class Leash:
    """The worker's end: a queue of orders, filled by a thread that calls `on_end(reason)` when the leash has ended."""

    def __init__(self, down: IO[bytes], up: IO[bytes], *, on_end: Callable[[str], None]) -> None:
        self.orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self.gathered: queue.SimpleQueue[Gathered] = queue.SimpleQueue()
        self.memory_bytes: Callable[[], int] = lambda: 0  # of this worker's arrays; told with every heartbeat
        self._down = down
        self._up = up
        self._sending = threading.Lock()
        self._on_end = on_end
        self._thread = threading.Thread(target=self._listen, name="leash", daemon=True)
        self._thread.start()

    def tell(self, event: Event) -> None:
        """Send an event up; the process ends if nobody listens."""
        line = encode(event)
        try:
            with self._sending:
                self._up.write(line)
                self._up.flush()
        except OSError:
            os._exit(1)

    def take(self, kind: type[Any]) -> Any:
        """Wait for the next order, which has to be of this kind."""
        order = self.orders.get()
        if not isinstance(order, kind):
            raise errors.RemoteError(f"expected {kind.__name__} from the controller, got {type(order).__name__}")
        return order

    def join(self) -> None:
        """Wait for the leash to end."""
        self._thread.join()

    def _listen(self) -> None:
        try:
            for line in self._lines():
                order = decode(line)
                if isinstance(order, Gathered):
                    self.gathered.put(order)
                elif isinstance(order, Beat):
                    self.tell(Alive(self.memory_bytes()))
                else:
                    self.orders.put(order)  # type: ignore[arg-type]
            reason = "the controller let go of the leash"
        except Exception as error:  # whatever it was, this thread may not end without ending the worker
            reason = str(error)
        self._on_end(reason)

    def _lines(self) -> Iterator[bytes]:
        # Unbuffered reads under select: a buffered readline would hide lines from select.
        pending = bytearray()
        silent_s = 0.0
        # Counted in beats: if this machine sleeps, or this process is stopped, one of them passes and not all.
        while silent_s < SILENCE_S:
            if not select.select([self._down], [], [], BEAT_S)[0]:
                silent_s += BEAT_S
                continue
            silent_s = 0.0
            chunk = os.read(self._down.fileno(), 1 << 20)
            if not chunk:
                return
            *ends, rest = chunk.split(b"\n")  # only what is new is searched: long lines come in many pieces
            for end in ends:
                pending += end
                yield bytes(pending)
                pending.clear()
            pending += rest
            if len(pending) > MAX_LINE_BYTES:
                raise errors.RemoteError(f"a line of more than {MAX_LINE_BYTES} bytes from the controller")
        raise errors.RemoteError(f"nothing heard from the controller for {SILENCE_S:g} s")


def main() -> None:
    """Serve one leash on stdin and stdout until it ends; always ends the process by itself."""
    run(_serve)


def run(serve: Callable[[Leash], None]) -> None:
    """Give `serve` the leash on stdin and stdout, tell the controller how it failed, and end the process."""
    os.umask(0o077)  # its log and what a data plane is told are its user's
    # Libraries may print; the leash may not carry that. It gets the real stdout, they get the log.
    up = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _log.setLevel(logging.INFO)
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(_FORMAT)
    _log.addHandler(console)
    logging.raiseExceptions = False  # a log that cannot be written is no reason to talk about it
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's to hear; it cancels, then lets go
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["HF_HUB_OFFLINE"] = "1"  # a worker reads its shard set and nothing else
    for name in HUB_VARIABLES:  # huggingface_hub is loaded all the same, and stops at some values
        os.environ.pop(name, None)
    leash = Leash(sys.stdin.buffer, up, on_end=lambda reason: _exit(reason, code=LEASH_LOST))
    try:
        serve(leash)
        _exit("done", code=0)
    except BaseException as error:  # whatever it was: say it, and end before anything can hang
        if not isinstance(error, MoectlError):
            _log.exception("unexpected")
        leash.tell(describe_failure(error))
        _exit(str(error))


def describe_failure(error: BaseException) -> Fatal:
    """Return what the controller is told of an error that ends a worker."""
    if isinstance(error, MoectlError):
        guilty = error.rank if isinstance(error, errors.RanksDisagree) else None
        return Fatal(to_json(error), guilty)
    if isinstance(error, RuntimeError) and str(error).startswith(BACKEND_ERRORS):
        return Fatal(to_json(errors.PeerLost(str(error))))
    return Fatal(to_json(MoectlError(f"unexpected {type(error).__name__}: {error}")))


def _serve(leash: Leash) -> None:
    start: Start = leash.take(Start)
    if start.log:
        _log_to(Path(start.log).expanduser())
    _log.info("rank %d of %d starts on %s", start.rank, start.world_size, start.shards)
    from moectl.model.manifest import read_manifest, refuse_links_outside
    from moectl.planner.this_machine import check_own_memory, count_kv_tokens

    directory = Path(start.shards).expanduser()
    manifest = read_manifest(directory)
    refuse_links_outside(directory)  # the tokenizer is read from there too
    if manifest.world_size != start.world_size:
        raise errors.NotDeployed(
            f"{directory} is cut for {manifest.world_size} ranks, not {start.world_size}", hint="moectl deploy"
        )
    if start.run.paranoia and manifest.placement.split == "layers":
        raise errors.UsageError(
            "--paranoia compares what all ranks compute, and with --split layers each computes its own layers",
            hint="leave it out: the canary at the start checks them",
        )
    if sys.platform != "darwin" and not start.run.force:  # before any rank here has taken memory
        check_own_memory(manifest, start.rank, ranks_here=start.ranks_here)
    group = open_group(leash, start, count_kv_tokens(manifest, start.rank, ranks_here=start.ranks_here))
    load: Load = leash.take(Load)
    import mlx.core as mx  # not before the group's environment is set

    if mx.metal.is_available() and not start.run.force:
        gpu = int(mx.device_info()["max_recommended_working_set_size"])
        check_own_memory(manifest, start.rank, ranks_here=start.ranks_here, working_set_bytes=gpu)
    begin = time.perf_counter()
    from moectl.engine.engine import PREFILL_STEP, Engine
    from moectl.engine.network.load import load_rank
    from moectl.shards.tokenizer import open_tokenizer
    from moectl.shards.verified import check_files

    check_files(directory, manifest, start.rank)  # in the phase that may take long: some files may have to be hashed
    dtype = getattr(mx, start.run.dtype) if start.run.dtype else None
    model = load_rank(directory, manifest, start.rank, group, dtype=dtype)
    if start.run.agree_routing:
        for layer in model.layers:
            layer.ffn.follow_first_rank()
    tokenizer = open_tokenizer(directory)
    engine = Engine(
        model,
        tokenizer,
        rank=start.rank,
        head_rank=manifest.placement.head_rank,
        group=group,
        max_seq_len=manifest.geometry.max_seq_len,
        prefill_step=start.run.prefill_step or PREFILL_STEP,
        kv_tokens=load.kv_tokens,
        cache_tokens=start.run.cache_tokens,
        speculate=start.run.speculate,
        check_every=start.run.paranoia,
    )
    _log.info("loaded in %.1f s, %.1f GB in use", time.perf_counter() - begin, mx.get_active_memory() / 1e9)
    q, geometry = manifest.quantization, manifest.geometry
    bits = q.bits if q else None
    leash.memory_bytes = mx.get_active_memory
    ready = Ready(manifest.placement.split, bits, geometry.vocab_size, geometry.max_seq_len, geometry.top_k)
    leash.tell(Loaded())
    leash.tell(_check_results(ready, model, manifest, start))
    for event in engine.serve(leash.orders):
        if isinstance(event, Done):
            _log.info("request %d: %s after %d tokens", event.id, event.finish_reason, event.stats.completion_tokens)
        _tell(leash, engine, event)


def _tell(leash: Leash, engine: Engine, event: Event) -> None:
    """Send an event up; an answer of which something cannot be put on the wire ends with an error."""
    if not isinstance(event, Prefilled | Token | Done | Refused):
        leash.tell(event)
        return
    failures: list[MoectlError] = []
    with isolated(event.id, failures.append):
        leash.tell(event)
    for error in failures:
        engine.fail(event.id)
        leash.tell(Refused.make(event.id, error))


def _check_results(ready: Ready, model: Any, manifest: Manifest, start: Start) -> Ready:
    """Return `ready` with what came of the canary, where there is one."""
    if manifest.canary is None or not start.run.canary:
        return ready
    from moectl.engine.network.canary_run import check

    found = check(model, manifest.canary, rank=start.rank)
    _log.info("canary: off by %.2g at most", found.verdict.worst)
    return replace(
        ready,
        checked=True,
        deviation=min(found.verdict.worst, sys.float_info.max),  # JSON has no infinity
        wrong_at=found.verdict.wrong_at,
        token_s=found.token_s,
        step_s=found.step_s,
    )


def open_group(leash: Leash, start: Start, kv_tokens: int | None = None) -> Any:
    """Promise free ports to the controller and join the group that it makes of all ranks; None for a single one."""
    with contextlib.ExitStack() as ports:
        numbers = [ports.enter_context(_free_port(address)) for address in start.addresses]
        leash.tell(Listening(own_versions(), numbers, kv_tokens, os.getpid()))
        return _join(leash, start, ports) if start.world_size > 1 else None


def _join(leash: Leash, start: Start, ports: contextlib.ExitStack) -> Any:
    """Join the group; the process ends if that takes longer than `init_timeout_s`.

    `ports` holds the promised ports until the backend takes them over.
    """
    connect: Connect = leash.take(Connect)
    import mlx.core as mx

    os.environ.update(connect.env)
    files = {name: _hold(text) for name, text in connect.files.items()}
    os.environ.update({name: f"/dev/fd/{file.fileno()}" for name, file in files.items()})
    ports.close()
    leash.tell(Connecting())
    # init holds the interpreter lock, so no Python thread could time it: faulthandler's timer is a C thread.
    faulthandler.dump_traceback_later(start.init_timeout_s, exit=True)
    try:
        with _leash_watched():
            if connect.backend == "jaccl":
                group = mx.distributed.init(strict=True, backend="jaccl", all_gather_factory=side_channel(leash))
            else:
                group = mx.distributed.init(strict=True, backend=connect.backend)
        _check_peers(group, start, connect.nonce)
    except (RuntimeError, ValueError) as error:
        raise errors.Unreachable(f"cannot join the {connect.backend} group: {error}") from None
    finally:
        faulthandler.cancel_dump_traceback_later()
        for file in files.values():
            file.close()
    _log.info("joined over %s as rank %d of %d", connect.backend, start.rank, start.world_size)
    leash.tell(Connected(group.rank(), group.size()))
    return group


# The end of the leash as a process sees it that reads nothing of it; then its parent, which cannot look, has to go.
_WATCH = """
import os, select, signal, sys
worker = int(sys.argv[1])
if hasattr(select, "kqueue"):  # poll hears of nothing there unless it is asked for something, such as unread beats
    hangs_up, wish = select.kqueue(), [select.kevent(0, select.KQ_FILTER_READ, select.KQ_EV_ADD | select.KQ_EV_CLEAR)]
    while not any(event.flags & select.KQ_EV_EOF for event in hangs_up.control(wish, 1)):
        wish = None
else:
    hangs_up = select.poll()
    hangs_up.register(0, getattr(select, "POLLRDHUP", 0))
    hangs_up.poll()
if os.getppid() == worker:
    os.kill(worker, signal.SIGKILL)
"""


@contextlib.contextmanager
def _leash_watched() -> Iterator[None]:
    """Let another process mind the leash while the block holds the interpreter lock, and with it this one's thread."""
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCH, str(os.getpid())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        watcher.kill()
        watcher.wait()


def _check_peers(group: Any, start: Start, nonce: int) -> None:
    """Make sure that every place in the group is taken by its rank of this launch, before anything is summed.

    The ring has no handshake: whoever connects first is the neighbour.
    """
    import mlx.core as mx

    own = mx.array([[nonce, start.rank, start.world_size]], dtype=mx.int32)
    rows: list[list[int]] = mx.distributed.all_gather(own, group=group).tolist()  # type: ignore[assignment]
    if rows != [[nonce, rank, start.world_size] for rank in range(start.world_size)]:
        raise errors.PeerLost(
            "a process that does not belong to this launch has joined the group",
            hint="run it again; if it comes back, look for what connects to this host's ports",
        )


def side_channel(leash: Leash) -> Any:
    """Return JACCL's `all_gather_factory`: its start-up exchange travels over the leash instead of a socket."""

    def factory(rank: int, size: int) -> Any:
        def all_gather(source: bytes, n_bytes: int) -> bytes:
            leash.tell(AllGather(bytes(source[:n_bytes]).hex()))
            return bytes.fromhex(leash.gathered.get().data)

        return all_gather

    return factory


@contextlib.contextmanager
def _free_port(address: str) -> Iterator[int]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        try:
            listener.bind((address, 0))
        except OSError as error:
            raise errors.HostsError(
                f"cannot listen on {address}: {error.strerror}", hint="give this host's own address with ip="
            ) from None
        yield listener.getsockname()[1]


def _hold(text: str) -> IO[str]:
    """Return a file without a name, to be read from its beginning: nothing is left of it, however this process ends."""
    file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - open while the backend starts
    file.write(text)
    file.flush()
    file.seek(0)
    return file


def own_versions() -> dict[str, str]:
    """Return this interpreter's versions of what has to be equal on every rank, and of Python."""
    names = ("mlx", "mlx-lm")
    return {
        "moectl": __version__,
        **{n: importlib.metadata.version(n) for n in names},
        "python": platform.python_version(),
    }


def _log_to(path: Path) -> None:
    """Keep a copy of the log on this host, two files of 1 MB at most; without one if the disk does not let us."""
    from logging.handlers import RotatingFileHandler

    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handler = RotatingFileHandler(path, maxBytes=1_000_000, backupCount=1, encoding="utf-8")
    except OSError as error:
        _log.warning("no log file: %s", error)
        return
    handler.setFormatter(_FORMAT)
    _log.addHandler(handler)


def _exit(reason: str, *, code: int = 1) -> None:
    # os._exit, not sys.exit: destructors of a broken ring may wait for ever. The log may be gone with the controller.
    with contextlib.suppress(Exception):
        _log.info("ends: %s", reason)
    os._exit(code)
