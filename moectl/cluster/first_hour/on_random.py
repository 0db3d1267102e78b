"""Steps with a random model of DBRX's widths and few layers: shares, command buffers, the prefill of `layers`.

They run `engine.measure` on all ranks. Where there is no GPU the model is narrow, except for the hidden dimension that
is divided: then it shows that the measurement works, and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moectl.cluster.first_hour.exchanges import alone
from moectl.cluster.first_hour.stage import Stage
from moectl.cluster.first_hour.step import Data, HourStep, Judgement, milliseconds
from moectl.model.geometry import DBRX, Geometry
from moectl.model.placement import Placement, make_placement
from moectl.model.structure import Quantization, Structure
from moectl.planner.measured import Job, Speed

BUDGET_S = 20.0  # for whole passes of one placement
BITS = Quantization(4, 64)
UNITS = DBRX.ffn_hidden // BITS.group_size  # 168 groups, which a rank holds whole
FAST_UNITS = 8  # 512 inputs: a multiple of them keeps the quantised product in MLX's fast kernel
CHUNK = 512  # tokens of a prompt at a time
GPU_LIMIT_S = 5.0
SAFE_S = 4.0
_GAIN = 1.02  # less is noise
_OPS, _MB = "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"
KNOBS: tuple[dict[str, str], ...] = ({}, {_OPS: "100"}, {_OPS: "400"}, {_MB: "400"}, {_MB: "2000", _OPS: "200"})
NARROW = replace(DBRX, n_layers=16, d_model=64, n_heads=2, kv_n_heads=1, n_experts=2, top_k=1, vocab_size=512)
NARROWEST = replace(NARROW, ffn_hidden=512)


def make_config(geometry: Geometry) -> dict[str, Any]:
    """Return the config.json of a DBRX of these sizes."""
    return {
        "model_type": "dbrx",
        "attn_config": {
            "clip_qkv": geometry.clip_qkv,
            "kv_n_heads": geometry.kv_n_heads,
            "rope_theta": geometry.rope_theta,
        },
        "ffn_config": {
            "ffn_hidden_size": geometry.ffn_hidden,
            "moe_normalize_expert_weights": geometry.moe_normalize,
            "moe_num_experts": geometry.n_experts,
            "moe_top_k": geometry.top_k,
        },
        "d_model": geometry.d_model,
        "max_seq_len": geometry.max_seq_len,
        "n_heads": geometry.n_heads,
        "n_layers": geometry.n_layers,
        "vocab_size": geometry.vocab_size,
    }


def describe(config: Mapping[str, Any]) -> Structure:
    """Return the structure of a model at the bits of these steps."""
    from moectl.shards.look.outline import outline
    from moectl.shards.look.skeleton import make_skeleton
    from moectl.shards.look.ways import look

    skeleton = make_skeleton(config)
    return outline(skeleton, look(skeleton), config).quantised(BITS)


def make_job(stage: Stage, split: str, shares: Sequence[Sequence[int] | None]) -> Job:
    """Return the job to measure one split of the model with each of these shares (None: even ones)."""
    config = make_config(DBRX if stage.has_gpu else NARROW if split == "hidden" else NARROWEST)
    structure = describe(config)
    placements: list[Placement] = [make_placement(structure, split, stage.size, shares=one) for one in shares]
    memory = stage.memory_to_use() if stage.has_gpu else 1 << 26
    return Job(tuple(placements), config, BITS, memory, CHUNK, stage.scale(BUDGET_S))


def describe_speed(speed: Speed) -> dict[str, float]:
    """Return the seconds of a token, and of a token of a prompt, in a DBRX with all its layers."""
    return {
        "token_s": speed.decode.total_s(DBRX.n_layers),
        "prompt_token_s": speed.prefill.total_s(DBRX.n_layers) / speed.prefill.tokens,
    }


def divide_evenly(ranks: int) -> tuple[int, ...]:
    """Return the groups of each rank, as alike as they can be: (84, 84)."""
    return tuple(UNITS // ranks + (rank < UNITS % ranks) for rank in range(ranks))


def divide_fast(ranks: int) -> tuple[int, ...]:
    """Return the groups of each rank in multiples of FAST_UNITS: (88, 80)."""
    whole = UNITS // FAST_UNITS
    return tuple(FAST_UNITS * (whole // ranks + (rank < whole % ranks)) for rank in range(ranks))


def find_shares_obstacle(stage: Stage) -> str:
    """Return why there is nothing to compare."""
    if alone(stage):
        return alone(stage)
    if not all(divide_fast(stage.size)):
        return "there are more ranks than multiples of 512"
    same = divide_evenly(stage.size) == divide_fast(stage.size)
    return f"equal shares are multiples of 512 on {stage.size} ranks" if same else ""


def measure_shares(stage: Stage) -> Data:
    """Return the seconds of a token with equal shares, and with shares in multiples of 512."""
    divided = (divide_evenly(stage.size), divide_fast(stage.size))
    speeds = stage.measure_speed(make_job(stage, "hidden", divided))
    return {
        "ranks": stage.size,
        "narrow": not stage.has_gpu,
        "shares": [
            {"shares": list(shares), **describe_speed(speed)} for shares, speed in zip(divided, speeds, strict=True)
        ],
    }


def judge_shares(data: Data) -> Judgement:
    """Say which shares are faster."""
    even, fast = data["shares"]
    names = ["/".join(map(str, one["shares"])) for one in (even, fast)]
    gain = even["token_s"] / max(fast["token_s"], 1e-9)
    came = ", ".join(
        f"{name}: {milliseconds(one['token_s'])} per token" for name, one in zip(names, (even, fast), strict=True)
    )
    if gain > _GAIN:
        shares = names[1].replace("/", ",")
        return Judgement(True, came, f"shard with --shares {shares}", "let plan prefer multiples of 8 groups")
    return Judgement(
        False, came, developers="leave the shares as they are: the slower kernel costs less than imbalance"
    )


def find_knobs_obstacle(stage: Stage) -> str:
    """Return why there are no command buffers."""
    return "" if all(facts.metal for facts in stage.facts) else "command buffers are Metal's, and a rank has no Metal"


def measure_knobs(stage: Stage) -> Data:
    """Return the seconds of a token for each setting of the command buffers."""
    job = make_job(stage, "hidden", [None])
    rows = []
    for env in KNOBS:
        [speed] = stage.measure_speed(job, env=env)
        rows.append({"env": env, **describe_speed(speed)})
    return {"ranks": stage.size, "settings": rows}


def judge_knobs(data: Data) -> Judgement:
    """Say whether a setting is faster than MLX's own."""
    usual, *others = data["settings"]
    best = min(others, key=lambda row: row["token_s"])
    gain = usual["token_s"] / max(best["token_s"], 1e-9)
    words = " ".join(f"{name}={value}" for name, value in best["env"].items())
    came = f"{milliseconds(usual['token_s'])} per token, {milliseconds(best['token_s'])} with {words}"
    if gain <= _GAIN:
        return Judgement(False, came, developers="leave MLX's own settings")
    return Judgement(True, came, f"until moectl does it: {words} under 'envs' of an MLX hostfile", f"set {words}")


def measure_layers(stage: Stage) -> Data:
    """Return how long the last rank of a pipeline waits for the first chunk of a prompt of DBRX."""
    [speed] = stage.measure_speed(make_job(stage, "layers", [None]), backend="ring")
    chunk_s = speed.prefill.total_s(DBRX.n_layers) * CHUNK / speed.prefill.tokens
    return {
        "ranks": stage.size,
        "narrow": not stage.has_gpu,
        "tokens": speed.prefill.tokens,
        "layer_s": speed.prefill.layer_s,
        "outer_s": speed.prefill.outer_s,
        "chunk_s": chunk_s,
        "wait_s": chunk_s * (stage.size - 1) / stage.size,
    }


def judge_layers(data: Data) -> Judgement:
    """Compare that wait with the GPU's limit."""
    came = f"a chunk of {CHUNK} tokens takes {data['chunk_s']:.2f} s, the last rank waits {data['wait_s']:.2f} s"
    if data["wait_s"] < GPU_LIMIT_S:
        return Judgement(True, came)
    tokens = max(1, int(CHUNK * SAFE_S / data["wait_s"]))
    return Judgement(
        False, came, f"use --prefill-step {tokens} with --split layers", f"read at most {tokens} tokens at a time there"
    )


SHARES = HourStep(
    "shares",
    "Are shares in multiples of 512 faster than equal ones?",
    300,
    "they are: with 84 groups of 64 the quantised down_proj leaves MLX's fast kernel, with 88 or 80 it does not",
    "mlx 0.32.4's quantised kernels: the fast one wants inputs in multiples of 512",
    measure_shares,
    judge_shares,
    find_shares_obstacle,
)
KNOB = HourStep(
    "command buffers",
    "Do larger command buffers make a token faster?",
    600,
    "they do: with large weights MLX commits after every expert product",
    f"mlx 0.32.4: {_OPS} and {_MB}",
    measure_knobs,
    judge_knobs,
    find_knobs_obstacle,
)
LAYERS = HourStep(
    "layers prefill",
    "How long does the last rank of --split layers wait for the first chunk?",
    300,
    f"it waits less than {GPU_LIMIT_S:g} s, the GPU's limit for a command buffer; for four ranks 15 s were predicted",
    "mlx#3830, mlx-vlm#2179: reported by others",
    measure_layers,
    judge_layers,
    alone,
)
