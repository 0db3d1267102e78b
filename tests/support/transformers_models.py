"""Small checkpoints of many families, computed by somebody else: transformers, in float32.

`tests/golden/published.json` has a config.json for each, with the keys of a published repository and small sizes.
`tests/golden/transformers.json` has what transformers said of it: the names, shapes and types of the tensors as it
saves them, and the tokens that follow a prompt; `transformers.npz` has the logits of the first of them. The weights are
made of the names, so that a test writes the same checkpoint without torch.

Run `python -m tests.support.transformers_models` (needs torch and transformers) to make the last two files again; with
a directory, to write them there, and with names of cases after it, for these only.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN = Path(__file__).parent.parent / "golden"
STEPS = 16
LOGITS = 4  # of the steps
VOCABULARY = 128
PROMPT = [(7 * i * i + 3 * i + 11) % 120 + 6 for i in range(24)]
CLEAR = 1e-3  # of the largest logit: by so much the first token is ahead of the second
DISTINCT = 6  # of the tokens, at least
SEEDS = 20
FLOAT32 = ("A_log", "e_score_correction_bias")  # endings of names that publishers store so
EMBEDDING = 2048  # what divides the numbers of an embedding

# How mlx-lm's own model files differ from transformers; the case beside it shows that all else is equal.
WRONG = {
    "gpt_oss": "mlx-lm's YaRN rounds its bounds although config.json says truncate: false, logits are 1e-2 off",
    "ernie4_5_moe": "mlx-lm leaves e_score_correction_bias out, other experts are chosen",
}

Shapes = dict[str, tuple[str, list[int]]]  # name → (safetensors' type, shape)


@cache
def _published() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((GOLDEN / "published.json").read_text(encoding="utf-8"))
    return found


@cache
def _golden() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((GOLDEN / "transformers.json").read_text(encoding="utf-8"))
    return found


def cases() -> list[str]:
    return list(_published())


def config_of(case: str) -> dict[str, Any]:
    """Return config.json as it is published, but for the sizes."""
    found: dict[str, Any] = _published()[case]["config"]
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def tokens_of(case: str) -> list[int]:
    """Return the tokens that transformers puts after the prompt."""
    found: list[int] = _golden()[case]["tokens"]
    return found


def logits_of(case: str) -> NDArray[np.float32]:
    """Return the logits of its first tokens: (LOGITS, VOCABULARY)."""
    with np.load(GOLDEN / "transformers.npz") as found:
        logits: NDArray[np.float32] = found[case]
    return logits


def write_model(case: str, directory: Path) -> Path:
    """Write the checkpoint of a case, as transformers saves it; return the directory."""
    found = _golden()[case]
    return _write(case, directory, config_of(case), found["tensors"], found["seed"])


def _write(case: str, directory: Path, config: dict[str, Any], tensors: Shapes, seed: int) -> Path:
    told = _published()[case]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape) in tensors.items():
        stored = make_tensor(name, dtype, shape, seed, told.get("embedding", EMBEDDING), told.get("norm", 1.0))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(stored)]}
        data += stored
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return directory


def make_tensor(name: str, dtype: str, shape: Sequence[int], seed: int, embedding: int, norm: float) -> bytes:
    """Return a tensor that its name decides, as it is stored: few bits times a power of two, so that nothing rounds.

    `embedding` divides the numbers of an embedding: it is so small that a model whose head it is does not repeat its
    last token. `norm` is what the weights of norms are near to.
    """
    size = math.prod(shape)
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], "little")
    # numpy keeps these numbers the same for ever.
    eight_bits = np.random.Philox(key=key).random_raw(-(-size // 8)).astype("<u8").view(np.uint8)[:size]
    if dtype == "U8":  # MXFP4: two values in a byte, and exponents
        return (122 + eight_bits % 2 if name.endswith("_scales") else eight_bits).astype(np.uint8).tobytes()
    if dtype == "F8_E4M3":  # exponents of 2**-3 to 1
        return (eight_bits & 0x87 | (4 + (eight_bits >> 3) % 4) << 3).astype(np.uint8).tobytes()
    if name.endswith("_scale_inv"):
        return (2.0 ** -(3 + (eight_bits % 2).astype(np.float64))).astype("<f4").tobytes()
    numbers = eight_bits.view(np.int8).astype(np.float32)
    if len(shape) == 1:  # norms, biases and the like
        values: NDArray[np.floating[Any]] = np.floor(numbers / 8) / 128 + np.float32(
            norm if "norm" in name and name.endswith("weight") else 0
        )
    elif "embed" in name:
        values = numbers / np.float32(embedding)
    else:
        spread = 74 * math.sqrt(max(shape[-1], 4))  # 74: the standard deviation of eight bits
        values = numbers * np.float32(2.0 ** -round(math.log2(spread)))
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    assert dtype == "BF16", dtype
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def _as_published(tensors: Shapes, config: dict[str, Any]) -> Shapes:
    """Return tensors in the types and format that publishers store: here transformers reads those, but saves others."""
    settings = config.get("quantization_config", {})
    method, made = settings.get("quant_method"), {}
    for name, (dtype, shape) in tensors.items():
        if name.endswith(FLOAT32):
            made[name] = "F32", shape
        elif method == "mxfp4" and len(shape) == 3:
            experts, inner, outer = shape
            made[f"{name}_blocks"] = "U8", [experts, outer, inner // 32, 16]
            made[f"{name}_scales"] = "U8", [experts, outer, inner // 32]
        elif method == "fp8" and ("_proj" in name or ".experts." in name) and len(shape) == 2:
            made[name] = "F8_E4M3", shape
            blocks = [-(-n // size) for n, size in zip(shape, settings["weight_block_size"], strict=True)]
            made[f"{name}_scale_inv"] = "F32", blocks
        else:
            made[name] = dtype, shape
    return made


def compute(case: str) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Return what transformers says of a case. The seed is the first at which its choices are clear."""
    import torch
    import transformers

    told = _published()[case]
    config = {**config_of(case), **told.get("transformers", {})}
    config.pop("auto_map", None)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "config.json").write_text(json.dumps(plain))
        kind = getattr(transformers, config["architectures"][0])
        model = kind(transformers.AutoConfig.from_pretrained(directory)).to(torch.bfloat16)
        model.save_pretrained(directory, save_original_format=not told.get("fused", False))
        tensors = _as_published(_read_shapes(directory / "model.safetensors"), config)
        for seed in range(SEEDS):
            _write(case, directory, config, tensors, seed)
            loaded, found = kind.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
            lost = {kind: found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if found[kind]}
            assert not lost, lost
            tokens, logits = _run(loaded.eval())
            ordered = np.sort(logits)
            clear = np.all(ordered[:, -1] - ordered[:, -2] > CLEAR * np.abs(logits).max(1))
            if clear and len(set(tokens)) >= DISTINCT:
                return {"tokens": tokens, "seed": seed, "tensors": tensors}, logits[:LOGITS]
    raise AssertionError(f"{case}: no seed gives clear choices")


def _run(model: Any) -> tuple[list[int], NDArray[np.float32]]:
    """Return greedy tokens and their logits; every step computes the whole text again, without a cache."""
    import torch

    text, rows = list(PROMPT), []
    with torch.no_grad():
        for _ in range(STEPS):
            logits = model(torch.tensor([text]), use_cache=False).logits[0, -1].float().numpy()
            rows.append(logits)
            text.append(int(logits.argmax()))
    return text[len(PROMPT) :], np.stack(rows)


def _read_shapes(path: Path) -> Shapes:
    with path.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    return {name: (told["dtype"], told["shape"]) for name, told in header.items() if name != "__metadata__"}


def make(directory: Path, only: Sequence[str]) -> None:
    """Compute cases and write transformers.json and transformers.npz."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    told: dict[str, dict[str, Any]] = {}
    logits: dict[str, Any] = {}
    for case in only:
        told[case], logits[case] = compute(case)
        print(case, "seed", told[case]["seed"], "largest logit", float(np.abs(logits[case]).max()), flush=True)  # noqa: T201
    lines = [f"{json.dumps(case)}: {json.dumps(found, separators=(',', ':'))}" for case, found in told.items()]
    (directory / "transformers.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    np.savez_compressed(directory / "transformers.npz", **logits)


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN, sys.argv[2:] or cases())
