"""The protocol between the controller and a worker: one JSON object per line, each a dataclass below.

Orders and heartbeats go to a worker's stdin, events come from its stdout; stderr is the worker's log. At end of file,
or after three seconds without a line, the worker exits. This module opens and closes no stream.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import IO, Any

from moectl.engine.request import Request, Stats
from moectl.errors import BadField, MoectlError, RemoteError, from_json, to_json
from moectl.records import build
from moectl.shards.chat.calls import CallPart

BEAT_S = 1.0  # the controller sends a line at least this often
SILENCE_S = 3.0  # a worker that hears nothing for this long exits
LINK_LOST = 75  # with this code, which no crash has (EX_TEMPFAIL)
MAX_LINE_BYTES = 64 * 1024 * 1024
NONCE_BITS = 31
PREFILL_STEP = 512  # tokens of a prompt that are read at a time, where a run says nothing else


def _shared(default: Any) -> Any:
    """Return a field in which those who use one controller have to agree."""
    return field(default=default, metadata={"shared": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a model is run, as the flags of `run`, `serve` and `bench` say; the same on every rank."""

    backend: str = _shared("auto")  # "auto": what the hosts suit
    start_timeout_s: float = 30.0  # for all ranks to join
    dtype: str | None = _shared(None)  # None: what suits the device
    force: bool = False  # load although the host's memory is too small
    canary: bool = True  # compare what the model computes with the set's canary
    agree_routing: bool = _shared(False)  # rank 0 chooses the experts for all
    paranoia: int = _shared(0)  # after this number of steps all ranks compare what they computed; 0: never
    cache_tokens: int | None = None  # for past answers at most; None: what the running ones leave
    prefill_step: int | None = _shared(None)  # tokens of a prompt that are read at a time; None: what the ranks can
    speculate: int = _shared(0)  # tokens that prompt lookup may propose at once; 0: none
    load_delays_s: tuple[float, ...] = ()  # for a measurement: each rank waits so long before it loads; (): none does

    def shared(self) -> dict[str, Any]:
        """Return the options in which those who use one controller have to agree, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if "shared" in field.metadata}


DEFAULT_OPTIONS = RunOptions()


# Down: orders.
@dataclass(frozen=True, slots=True)
class Start:
    """Open the shard set and find free ports; answered by Listening."""

    rank: int
    world_size: int
    shards: str  # directory on the worker's host
    addresses: list[str]  # of this rank, for tensor traffic
    init_timeout_s: float
    log: str | None = None  # file on the worker's host for a copy of its log
    ranks_here: int = 1  # that share this host's memory
    run: RunOptions = DEFAULT_OPTIONS


@dataclass(frozen=True, slots=True)
class Connect:
    """Set the environment, write the files, join the group; answered by Connecting, then Connected."""

    backend: str
    env: dict[str, str]
    files: dict[str, str]  # variable that names the file → its contents
    nonce: int = 0  # known to the ranks of this launch alone


@dataclass(frozen=True, slots=True)
class Load:
    """Read the weights; answered by Loaded."""

    kv_tokens: int | None = None  # keys and values of this many tokens fit on every rank; None: not known
    prefill_step: int | None = None  # tokens of a prompt that every rank can read at a time; None: any number


@dataclass(frozen=True, slots=True)
class Check:
    """Compute for the first time; answered by Ready. It comes when every rank has said Loaded.

    A rank that waited for another's load inside an exchange would be killed on a Mac: macOS ends work of the GPU that
    waits for more than about 5 s.
    """


@dataclass(frozen=True, slots=True)
class Generate:
    """Answer a request: the rank that has the head sends Token… and Done, or Refused."""

    request: Request


@dataclass(frozen=True, slots=True)
class Profile:
    """Measure the parts of these tokens' decode steps; every rank answers with Profiled, rank 0 with Prefilled before.

    `id` counts up with those of requests, so that it comes between the same two of them on every rank.
    """

    id: int
    tokens: list[int]
    steps: int  # the last this many tokens go through one by one, those before them as a prompt


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a request soon; Done follows with the finish reason "cancelled"."""

    id: int


@dataclass(frozen=True, slots=True)
class Beat:
    """Say that the controller lives."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """Answer an AllGather with every rank's bytes in rank order (hexadecimal)."""

    data: str


# Up: events.
@dataclass(frozen=True, slots=True)
class Listening:
    """Free ports, one per address."""

    versions: dict[str, str]
    ports: list[int]
    kv_tokens: int | None = None  # whose keys and values will fit here beside the weights; None: not known
    pid: int | None = None  # on its host
    macos: str | None = None  # its version, "26.2"; None on another system
    wheel: str = ""  # platform tag of the wheel of its mlx, "macosx_26_0_arm64"
    jaccl: bool | None = None  # whether its mlx can do RDMA; None for a single rank, which needs none
    split: str = ""  # of its shard set; "": it has none
    prefill_step: int | None = None  # tokens of a prompt that this rank can read at a time; None: any number


@dataclass(frozen=True, slots=True)
class Connecting:
    """About to enter mlx.distributed.init, which blocks the worker: no heartbeat is answered there."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The group is complete."""

    rank: int
    world_size: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """The weights are in memory; no exchange is built before Check comes."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Requests may come; what kind of model it is."""

    split: str
    bits: int | None  # per weight; None: not quantised
    vocab_size: int
    max_seq_len: int
    top_k: int
    checked: bool = False  # whether the set's canary was run; the next fields are its findings
    deviation: float = 0.0  # the largest, relative to the expected number
    wrong_at: int | None = None  # the first exchange that is off
    token_s: float = 0.0  # for each token of a prompt
    step_s: float = 0.0  # for a single token
    sampling: dict[str, int | float] = field(default_factory=dict)  # the model's defaults, by parameter
    tools: str = "none"  # how it is told of tools: by its own "template", as "text", or not at all: "none"
    thinks: bool = False  # whether it thinks before it answers, or can


@dataclass(frozen=True, slots=True)
class Alive:
    """Answers a Beat: the worker lives, and holds this many bytes of arrays."""

    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """This many of a prompt's tokens have been processed."""

    id: int
    tokens: int
    cached: int = 0  # of them: known from an answer before


@dataclass(frozen=True, slots=True)
class Token:
    """One more token, and the text that became final with it: none while a character is incomplete.

    `thinking` is text that comes before the answer, and before `text`; `calls` come after `text`.
    """

    id: int
    token: int
    text: str
    logprob: float | None = None  # natural; of the model before temperature and the like, where it was asked for
    top: list[tuple[int, str, float]] = field(default_factory=list)  # (token, text, logprob) of the most probable
    offset: int = 0  # characters of the answer before its own text, told or held back
    thinking: str = ""
    calls: list[CallPart] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer: "stop", "length", "cancelled", or "tool_calls" where it stopped after such calls."""

    id: int
    finish_reason: str
    stats: Stats
    rest: str = ""  # text that was held back until the end
    rest_thinking: str = ""  # the same of the thinking
    rest_calls: list[CallPart] = field(default_factory=list)  # that ended with the answer, after `rest`
    stop_text: str | None = None  # the one of the request's stop texts that ended it


@dataclass(frozen=True, slots=True)
class Profiled:
    """Where a rank's time goes in one decode step, and what its router chose.

    See `moectl.engine.profile` for each figure. Times are means over the steps, `compute_s` and `all_reduce_s` also
    sums over a step's layers.
    """

    id: int
    compute_s: float
    all_reduce_s: float
    step_s: float  # one such step, with everything that profiling adds
    exchanges: int  # all-reduces in one step
    peak_memory_bytes: int  # of MLX's arrays, since the process began
    peak_rss_bytes: int  # of the process
    layers: list[int]  # that this rank has
    chosen: list[list[int]]  # per such layer and expert: how often it was chosen
    own_experts: float  # that this rank runs, per token and layer
    busiest_experts: float  # that the busiest rank of each layer runs, per token and layer


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that cannot be answered, or whose answer an error in moectl has ended; the worker goes on."""

    id: int
    error: dict[str, Any]  # by `to_json`
    param: str | None = None  # these two are BadField's
    code: str | None = None

    @classmethod
    def make(cls, request_id: int, error: MoectlError) -> Refused:
        """Return the message that tells an error."""
        if isinstance(error, BadField):
            return cls(request_id, to_json(error), error.param, error.code)
        return cls(request_id, to_json(error))

    def to_error(self) -> MoectlError:
        """Return the error that was told."""
        error = from_json(self.error)
        if isinstance(error, BadField):
            return BadField(error.message, hint=error.hint, param=self.param, code=self.code)
        return error


@dataclass(frozen=True, slots=True)
class Fatal:
    """Why this worker is about to exit."""

    error: dict[str, Any]  # by `to_json`
    rank: int | None = None  # that is at fault; None: the one that tells it


@dataclass(frozen=True, slots=True)
class AllGather:
    """JACCL's start-up exchange: bytes (hexadecimal) to share with all ranks."""

    data: str


Order = Start | Connect | Load | Check | Generate | Profile | Cancel | Beat | Gathered
Event = (
    Listening
    | Connecting
    | Connected
    | Loaded
    | Ready
    | Alive
    | Prefilled
    | Token
    | Done
    | Profiled
    | Refused
    | Fatal
    | AllGather
)
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (*Order.__args__, *Event.__args__)}


def encode(message: Order | Event) -> bytes:
    """Return a message as one line of ASCII JSON with its newline."""
    return json.dumps({"type": type(message).__name__, **dataclasses.asdict(message)}).encode() + b"\n"


def decode(line: bytes) -> Order | Event:
    """Return the message on a line; raise RemoteError when it is none."""
    try:
        fields = json.loads(line)
        message: Order | Event = build(_KINDS[fields.pop("type")], fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        # The words of a login shell help to find the cause; a part of a message may hold a prompt and is not shown.
        shown = (
            "" if {*b'{"}'} & {*line[:4096], *line[-4096:]} else f": {line[:80].decode('utf-8', 'replace').rstrip()!r}"
        )
        raise RemoteError(f"not a message of moectl's worker protocol{shown}") from None
    return message


def read_messages(stream: IO[bytes]) -> Iterator[Order | Event]:
    """Yield messages until end of file; raise RemoteError at the first line that is none, or too long."""
    while line := stream.readline(MAX_LINE_BYTES):
        if not line.endswith(b"\n") and len(line) == MAX_LINE_BYTES:
            raise RemoteError(f"a line of more than {MAX_LINE_BYTES} bytes in the worker protocol")
        yield decode(line)
