"""Measure a running session: speeds in trials as a user would see them, then where the time of a token goes.

Prompts are random tokens: new ones in every trial, so that no cache has them, and the same on every machine, so that
numbers can be compared. Answers go on to their full length. Routing counts are those of the first trial. The parts of
a token's time come from `moectl.engine.profile`, which defines them; speeds come from the trials alone.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moectl.engine.protocol import Done, Profile, Profiled, Ready, Token
from moectl.engine.random_prompts import RandomPrompts, check_uncached
from moectl.engine.request import Request
from moectl.errors import UsageError
from moectl.model.ownership import normalise
from moectl.model.placement import Placement
from moectl.model.routing import Routing
from moectl.session.session import Session

PROFILED_STEPS = 16
MIN_GENERATION = 2  # a speed needs the time between two tokens
_WARM_UP = 4


@dataclass(frozen=True, slots=True)
class Predicted:
    """What `moectl plan` expected of these trials."""

    decode_tok_s: float
    prefill_tok_s: float
    ttft_s: float
    communication_share: float | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """One answer's speeds; `ttft_s` from the request's arrival at rank 0 to its first token."""

    prefill_tok_s: float
    decode_tok_s: float
    ttft_s: float


@dataclass(frozen=True, slots=True)
class MeanDeviation:
    """Mean and sample standard deviation over trials; one trial has no deviation."""

    mean: float
    sd: float | None


@dataclass(frozen=True, slots=True)
class RankTime:
    """One rank's part of a token's time; compute + all-reduce + other is the step's time, and none is negative."""

    rank: int
    host: str
    compute_s: float
    all_reduce_s: float
    other_s: float
    exchanges: int  # per token
    own_experts: float  # that it runs, per token and layer
    peak_memory_bytes: int
    peak_rss_bytes: int
    overlap_s: float = 0.0  # by which compute and all-reduce, measured apart, exceed the step


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What was measured."""

    name: str
    model: Ready
    prompt_tokens: int
    generation_tokens: int
    trials: tuple[Trial, ...]
    ranks: tuple[RankTime, ...]
    busiest_experts: float | None  # that the busiest rank of each layer runs, per token; None: ranks take turns
    routing: Routing | None  # None: a dense model
    predicted: Predicted | None = None

    @property
    def prefill_tok_s(self) -> MeanDeviation:
        return _measured(trial.prefill_tok_s for trial in self.trials)

    @property
    def decode_tok_s(self) -> MeanDeviation:
        return _measured(trial.decode_tok_s for trial in self.trials)

    @property
    def ttft_s(self) -> MeanDeviation:
        return _measured(trial.ttft_s for trial in self.trials)

    @property
    def step_s(self) -> float:
        """Mean time per token over the trials."""
        return _step_s(self.trials)

    @property
    def slowest(self) -> RankTime:
        """The rank that computes longest: the others wait for it, so its all-reduce is the network's."""
        return max(self.ranks, key=lambda rank: rank.compute_s)

    @property
    def communication_share(self) -> float:
        """The slowest rank's all-reduces, as far as it waits for them, as part of the time per token."""
        return self.slowest.all_reduce_s / self.step_s

    @property
    def imbalance(self) -> float | None:
        """The busiest rank's experts per token and layer relative to the mean of all ranks; 1 is balanced."""
        if self.busiest_experts is None:
            return None
        return self.busiest_experts / statistics.fmean(rank.own_experts for rank in self.ranks)


def bench(
    session: Session,
    name: str,
    *,
    prompt_tokens: int,
    generation_tokens: int,
    trials: int,
    ids: Iterator[int] | None = None,
    seed: int = 0,
    predicted: Predicted | None = None,
    on_trial: Callable[[int, Trial], None] = lambda number, trial: None,
) -> Benchmark:
    """Measure a session that has no other user; `on_trial(number, trial)` gets each trial as it ends.

    Several measurements of one session share `ids`, the numbers of their requests, and have a `seed` each.

    Raises UsageError when the model's context is too short, and what Session raises when a rank fails.
    """
    model = session.model
    if generation_tokens < MIN_GENERATION:
        raise UsageError(f"generation tokens should be {MIN_GENERATION} or more, it is {generation_tokens}")
    if prompt_tokens + generation_tokens > model.max_seq_len:
        raise UsageError(
            f"{prompt_tokens} prompt and {generation_tokens} generated tokens are more than the model's context of "
            f"{model.max_seq_len}",
            hint=f"use -p {max(1, model.max_seq_len - generation_tokens)}, or less",
        )
    ids = ids or itertools.count(1)
    prompts = RandomPrompts(model.vocab_size, seed)
    warm_up = prompts.draw(prompt_tokens)
    _answer(session, Request(next(ids), "", _WARM_UP, prompt_tokens=warm_up, ignore_eos=True, cache_prompt=False))
    done: list[Trial] = []
    profiles: list[list[Profiled]] = []
    steps = min(PROFILED_STEPS, generation_tokens - 1)
    for number in range(1, trials + 1):
        prompt = prompts.draw(prompt_tokens)
        request = Request(next(ids), "", generation_tokens, prompt_tokens=prompt, ignore_eos=True, cache_prompt=False)
        tokens, trial = _answer(session, request)
        # After each trial, so that both run under the same conditions.
        profiles.append(session.profile(Profile(next(ids), [*prompt, *tokens], steps)))
        done.append(trial)
        on_trial(number, trial)
    by_rank = zip(session.hosts, zip(*profiles, strict=True), strict=True)
    return Benchmark(
        name,
        model,
        prompt_tokens,
        generation_tokens,
        tuple(done),
        tuple(_rank_time(rank, host, own, _step_s(done)) for rank, (host, own) in enumerate(by_rank)),
        profiles[0][0].busiest_experts if model.split != "layers" and model.top_k else None,
        _join_routing(name, model.top_k, prompt_tokens + generation_tokens, profiles[0]),
        predicted,
    )


def _answer(session: Session, request: Request) -> tuple[list[int], Trial]:
    tokens: list[int] = []
    for event in session.generate(request):
        match event:
            case Token(token=token):
                tokens.append(token)
            case Done(stats=stats):
                check_uncached(stats)
                decode_s = stats.decode_s / max(1, stats.completion_tokens - 1)
                trial = Trial(stats.prompt_tokens / stats.prompt_s, 1 / decode_s, stats.ttft_s)
    return tokens, trial


def _step_s(trials: Iterable[Trial]) -> float:
    return statistics.fmean(1 / trial.decode_tok_s for trial in trials)


def _rank_time(rank: int, host: str, profiles: Sequence[Profiled], step_s: float) -> RankTime:
    """Divide a step's time into parts: what the profile measured, as far as it fits into an ordinary step.

    The profile's barriers end the overlap of an exchange with what is built meanwhile, so its parts may exceed a step.
    """
    computes_s = statistics.fmean(profile.compute_s for profile in profiles)
    exchanges_s = statistics.fmean(profile.all_reduce_s for profile in profiles)
    compute_s = min(computes_s, step_s)
    all_reduce_s = min(exchanges_s, step_s - compute_s)
    first = profiles[0]  # its peaks are from before it; its choices are those that are counted
    return RankTime(
        rank,
        host,
        compute_s,
        all_reduce_s,
        step_s - compute_s - all_reduce_s,
        first.exchanges,
        first.own_experts,
        first.peak_memory_bytes,
        first.peak_rss_bytes,
        max(0.0, computes_s + exchanges_s - step_s),
    )


def _join_routing(name: str, top_k: int, tokens: int, profiles: Iterable[Profiled]) -> Routing | None:
    """Take each layer from the first rank that has it: where several have it, their routers agree."""
    layers: dict[int, tuple[int, ...]] = {}
    for profile in profiles:
        for layer, counts in zip(profile.layers, profile.chosen, strict=True):
            layers.setdefault(layer, tuple(counts))
    if not any(layers.values()):
        return None
    return Routing(name, tokens, top_k, tuple(layers[layer] for layer in sorted(layers)))


def _measured(values: Iterable[float]) -> MeanDeviation:
    numbers = list(values)
    return MeanDeviation(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


def read_prediction(path: Path, placement: Placement | None, bits: int | None, *, prompt_tokens: int) -> Predicted:
    """Return the prediction in a document of `moectl plan --json`, its first token's time for this many prompt tokens.

    Raises UsageError when it is none, or of something else than this placement at this many bits (None: 16-bit).
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != "moectl.plan/1":
            raise ValueError("another schema")
        prediction = document["prediction"]
        decode, prefill = float(prediction["decode_tok_s"]), float(prediction["prefill_tok_s"])
        share = prediction.get("communication_share")
        predicted = Predicted(decode, prefill, prompt_tokens / prefill, None if share is None else float(share))
        shares = normalise([float(share) for share in document["shares"]])
        planned = (str(document["split"]), shares, int(document["q_bits"]), document["layers"])
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ZeroDivisionError):
        raise UsageError(f"{path} has no prediction of this version's 'moectl plan --json'") from None
    if placement is not None:
        here = (placement.split, normalise(placement.shares), bits or 16, placement.structure.n_layers)
        if planned != here:
            raise UsageError(
                f"{path} plans something else: {_describe_planned(*planned)}, and here is {_describe_planned(*here)}",
                hint="plan what is to be measured",
            )
    return predicted


def _describe_planned(split: str, shares: tuple[int | float, ...], bits: int, layers: int) -> str:
    return f"{split} {':'.join(f'{share:.3g}' for share in shares)} of {layers} layers at {bits} bits"
