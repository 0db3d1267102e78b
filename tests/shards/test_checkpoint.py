"""checkpoint and layouts: every layout gives the same tensors, every damage one clear error."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from moectl.errors import CheckpointError, IntegrityError, MoectlError, StateError, Unreachable, UsageError
from moectl.model.geometry import read_geometry
from moectl.model.structure import Quantization
from moectl.shards.blueprint import Blueprint, draw, find_quantization
from moectl.shards.source.checkpoint import Checkpoint, open_checkpoint, pull
from moectl.shards.source.hub import _require_space
from moectl.shards.source.stored import StoredReader
from moectl.shards.source.tensors import item_bytes
from moectl.shards.trace.parts import full, part
from moectl.shards.trace.places import find_rectangles
from moectl.shards.trace.traced import sources
from tests.support import hub_client
from tests.support.cutting import assert_same
from tests.support.hub import Fault, Hub
from tests.support.layouts import write_layout
from tests.support.tiny import (
    json_values,
    make_config,
    make_weights,
    to_layout,
    to_parameters,
    write_checkpoint,
    write_hollow_dbrx,
    write_weights,
)

SMALL: dict[str, Any] = {"n_layers": 1, "n_experts": 2, "top_k": 1, "ffn_hidden": 128}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def read_all(opened: Checkpoint, blueprint: Blueprint) -> dict[str, mx.array]:
    """Return the model's parameters, read from where the headers say that their bytes lie."""
    files = {file: os.open(opened.path(file), os.O_RDONLY) for file in opened.sizes}
    read = StoredReader(opened.stored, files.__getitem__)
    made = {name: part(node, full(node.shape), read) for name, node in blueprint.parameters.items()}
    for fd in files.values():
        os.close(fd)
    return made


def assert_parameters(directory: Path, expected: dict[str, mx.array]) -> Blueprint:
    """Assert that a checkpoint gives exactly these parameters, bit for bit; return its blueprint."""
    opened = open_checkpoint(str(directory))
    blueprint = draw(opened)
    made = read_all(opened, blueprint)
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        assert_same(made[name], value, name)
    return blueprint


def quantised(whole: dict[str, mx.array], bits: int, group: int, mode: str = "affine") -> dict[str, mx.array]:
    """Return parameters as `mlx_lm.convert` quantises those of DBRX."""
    made: dict[str, mx.array] = {}
    for name, value in whole.items():
        if value.ndim == 1 or ".router." in name:
            made[name] = value
            continue
        parts = mx.quantize(value, group_size=group, bits=bits, mode=mode)
        names = ("weight", "scales", "biases")
        made |= {name.removesuffix("weight") + n: array for n, array in zip(names, parts, strict=False)}
    return made


def make_parameters(seed: int = 0, dtype: str = "bfloat16", **sizes: Any) -> dict[str, mx.array]:
    geometry = read_geometry(make_config(**sizes))
    return to_parameters(make_weights(geometry, dtype=dtype, seed=seed), geometry)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a safetensors file's header; the data stay."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


# Layouts.


@pytest.mark.parametrize("layout", ["fused", "v2", "mlx"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_layout_gives_the_same_tensors(tmp_path: Path, layout: str, dtype: str) -> None:
    files = {"fused": 3, "v2": 2, "mlx": 1}[layout]
    directory = write_checkpoint(tmp_path / "m", layout=layout, dtype=dtype, files=files, seed=7)
    assert assert_parameters(directory, make_parameters(7, dtype)).quantization is None
    opened = open_checkpoint(str(directory))
    assert (opened.source, opened.revision) == ("m", None)
    assert len(opened.sizes) == files
    assert all((directory / f).stat().st_size == size for f, size in opened.sizes.items())


def test_the_real_model_opens_by_its_headers(tmp_path: Path) -> None:
    """All 263 GB of databricks/dbrx-instruct as holes: sizes as the real index has them."""
    opened = open_checkpoint(str(write_hollow_dbrx(tmp_path)))
    blueprint = draw(opened)
    assert len(opened.sizes) == 61
    down = "transformer.blocks.39.ffn.experts.down_proj.weight"
    files = {name: {opened.stored[s].file for s in sources([node])} for name, node in blueprint.parameters.items()}
    last = "model-00061-of-00061.safetensors"
    assert {n for n, held in files.items() if last in held} == {"transformer.norm_f.weight", "lm_head.weight", down}
    assert sum(node.nbytes for node in blueprint.parameters.values()) == 263_193_047_040
    assert len(blueprint.parameters) == 3 + 40 * (7 + 3)
    node = blueprint.parameters[down]
    (whole,) = find_rectangles(node, ((15, 16), *full(node.shape)[1:])) or []
    assert (whole.rows, whole.cols, whole.transposed) == (10752, 6144, True)
    assert whole.offset == 15 * 2 * 10752 * 6144


@pytest.mark.parametrize(
    ("bits", "group", "mode"),
    [(4, 64, "affine"), (3, 32, "affine"), (8, 64, "affine"), (4, 32, "mxfp4"), (4, 16, "nvfp4")],
)
def test_quantised_tensors_are_those_of_mlx(tmp_path: Path, bits: int, group: int, mode: str) -> None:
    directory = write_checkpoint(
        tmp_path / "m", layout="mlx-quantized", q_bits=bits, q_group_size=group, q_mode=mode, **SMALL
    )
    blueprint = assert_parameters(directory, quantised(make_parameters(**SMALL), bits, group, mode))
    assert blueprint.quantization == Quantization(bits, group, mode)


@pytest.mark.parametrize("named", [True, False])
def test_one_module_may_be_quantised_its_own_way(tmp_path: Path, named: bool) -> None:
    """config.json says so, or the shapes of the tensors do: mlx-lm reads both."""
    directory = write_checkpoint(tmp_path / "m", layout="mlx-quantized", files=1, **SMALL)
    config = json.loads((directory / "config.json").read_text())
    weights = make_weights(read_geometry(config))
    parts = mx.quantize(weights["lm_head.weight"], bits=8, group_size=32)
    own = dict(zip(("lm_head.weight", "lm_head.scales", "lm_head.biases"), parts, strict=True))
    write_weights(directory, {**to_layout(weights, read_geometry(config), "mlx-quantized"), **own})
    if named:
        edit_json(
            directory / "config.json",
            lambda c: c["quantization"].update({"lm_head": {"bits": 8, "group_size": 32}}),
        )
    blueprint = assert_parameters(directory, {**quantised(make_parameters(**SMALL), 4, 64), **own})
    head = blueprint.skeleton.model.lm_head
    assert (head.bits, head.group_size) == (8, 32)


def test_w2_may_be_stored_either_way_round(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m", layout="v2", files=1, **SMALL)
    geometry = read_geometry(make_config(**SMALL))
    stored = to_layout(make_weights(geometry), geometry, "v2")
    write_weights(directory, {n: mx.contiguous(v.T) if n.endswith("w2.weight") else v for n, v in stored.items()})
    assert_parameters(directory, make_parameters(**SMALL))


def test_a_square_w2_is_taken_as_out_by_in(tmp_path: Path) -> None:
    square = {**SMALL, "ffn_hidden": 64}
    assert_parameters(write_checkpoint(tmp_path / "m", layout="v2", **square), make_parameters(**square))


def test_other_tensors_and_files_do_not_matter(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m", files=1, **SMALL)
    geometry = read_geometry(make_config(**SMALL))
    extra = {
        "transformer.blocks.0.norm_attn_norm.attn.rotary_emb.inv_freq": mx.ones((8,)),
        "x": mx.ones((2,)),
    }
    write_weights(directory, {**to_layout(make_weights(geometry), geometry, "fused"), **extra})
    for name in ("modeling_dbrx.py", "pytorch_model.bin", "tokenizer.pkl", "README.md"):
        (directory / name).write_text("no")
    for name in ("NOTICE", "tokenizer.json", "cl100k.tiktoken", "chat_template.jinja", "merges.txt"):
        (directory / name).write_text("yes")
    assert_parameters(directory, make_parameters(**SMALL))
    opened = open_checkpoint(str(directory))
    small = {"LICENSE", "NOTICE", "chat_template.jinja", "cl100k.tiktoken", "config.json", "merges.txt"}
    assert set(opened.sidecars) == small | {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("index", [True, False])
def test_another_layout_of_the_same_weights_beside_them_is_passed_over(tmp_path: Path, index: bool) -> None:
    """As Mistral publishes: consolidated.safetensors holds them all once more, by other names."""
    directory = write_layout(tmp_path, "qwen3")
    plain = open_checkpoint(str(directory))
    mx.save_safetensors(str(directory / "consolidated.safetensors"), {"layers.0.wq": mx.zeros((4, 4), mx.bfloat16)})
    if not index:
        (directory / INDEX).unlink()
    opened = open_checkpoint(str(directory))
    assert (opened.stored, opened.sizes) == (plain.stored, plain.sizes)
    assert draw(opened).parameters.keys() == draw(plain).parameters.keys()


def test_what_modelopt_writes_beside_the_config_counts(tmp_path: Path) -> None:
    """NVIDIA's repositories say in a file of its own how they are quantised; where config.json says it, that counts."""
    directory = write_layout(tmp_path, "qwen3")
    told: dict[str, Any] = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (directory / "hf_quant_config.json").write_text(json.dumps(told))
    opened = open_checkpoint(str(directory))
    assert opened.config["quantization_config"] == {"quant_method": "modelopt", **told}
    assert find_quantization(opened.config) == Quantization(4, 16, "nvfp4")
    with pytest.raises(CheckpointError, match="says that the checkpoint is quantised, and no tensor is"):
        draw(opened)
    told["quantization"]["quant_algo"] = "FP8"
    (directory / "hf_quant_config.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="quantised by modelopt as 'FP8', which moectl does not read"):
        draw(open_checkpoint(str(directory)))
    (directory / "hf_quant_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json is not a JSON object"):
        open_checkpoint(str(directory))
    own = {"quant_method": "fp8"}
    edit_json(directory / "config.json", lambda c: c.update(quantization_config=own))
    assert open_checkpoint(str(directory)).config["quantization_config"] == own


def test_a_directory_is_never_written_to(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m", **SMALL)
    before = {p.name: p.stat().st_mtime_ns for p in directory.iterdir()}
    with open_checkpoint(str(directory), work_dir=tmp_path / "work") as opened:
        for file in opened.sizes:
            opened.prefetch(file)
            assert opened.path(file) == directory / file
            opened.release(file)
    assert pull(str(directory)) == directory
    assert {p.name: p.stat().st_mtime_ns for p in directory.iterdir()} == before
    assert not (tmp_path / "work").exists()


# Damage: one clear error each, from the headers.


def _drop(name: str) -> Callable[[Path], None]:
    return lambda d: edit_header(d / SECOND, lambda h: h.update({"x." + name: h.pop(name)}))


def _change(**fields: Any) -> Callable[[Path], None]:
    name = "transformer.blocks.0.ffn.experts.mlp.w1"
    return lambda d: edit_header(d / SECOND, lambda h: h[name].update(fields))


def _truncate(d: Path) -> None:
    os.truncate(d / SECOND, (d / SECOND).stat().st_size - 1)


def _append(d: Path) -> None:
    with (d / SECOND).open("ab") as f:
        f.write(b"more")


def _mix(d: Path) -> None:
    expert = mx.zeros((128, 64), mx.bfloat16)
    (d / INDEX).unlink()
    mx.save_safetensors(str(d / "model-extra.safetensors"), {"transformer.blocks.0.ffn.experts.0.w1.weight": expert})


def _pickles(d: Path) -> None:
    for file in (FIRST, SECOND, INDEX):
        (d / file).unlink()
    (d / "pytorch_model.bin").write_bytes(b"\x80")


def _config(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda d: edit_json(d / "config.json", edit)


def _index(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda d: edit_json(d / INDEX, edit)


DAMAGES: list[tuple[str, Callable[[Path], object], type[MoectlError], str]] = [
    (
        "missing tensor",
        _drop("transformer.blocks.0.ffn.experts.mlp.w1"),
        CheckpointError,
        r"does not give the parameter transformer\.blocks\.0\.ffn\.experts\.gate_proj\.weight$",
    ),
    (
        "more layers",
        _config(lambda c: c.update(n_layers=3)),
        CheckpointError,
        r"does not give the parameter .*blocks\.1\..* \(and 19 more\)",
    ),
    (
        "absurdly many layers",
        _config(lambda c: c.update(n_layers=10**12)),
        CheckpointError,
        r"n_layers is 1000000000000, more than any model has",
    ),
    (
        "wrong shape",
        _config(lambda c: c.update(vocab_size=77)),
        CheckpointError,
        r"wte.* has shape \(128, 64\).*\(77, 64\)",
    ),
    (
        "wrong fused shape",
        _config(lambda c: c["ffn_config"].update(ffn_hidden_size=64)),
        CheckpointError,
        r"gate_proj\.weight has shape \(2, 128, 64\).*\(2, 64, 64\)",
    ),
    ("wrong dtype", _change(dtype="I16"), CheckpointError, r"gate_proj\.weight is stored as I16"),
    ("two layouts", _mix, CheckpointError, r"has no tensor .*experts\.1\.w1\.weight"),
    ("another model", _config(lambda c: c.update(model_type="llama")), CheckpointError, r"can build: llama: .*missing"),
    ("an unknown model", _config(lambda c: c.update(model_type="dbrx2")), CheckpointError, r"model_type = 'dbrx2'"),
    ("a program of its own", _config(lambda c: c.update(model_file="m.py")), CheckpointError, r"model_file = 'm\.py'"),
    (
        "another quantisation",
        _config(lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4})),
        CheckpointError,
        r"quantised by 'gptq', which moectl does not read",
    ),
    (
        "odd quantisation",
        _config(lambda c: c.update(quantization={"bits": 99})),
        CheckpointError,
        r"no bits or no group_size",
    ),
    (
        "quantised by its config only",
        _config(lambda c: c.update(quantization={"bits": 4, "group_size": 64})),
        CheckpointError,
        r"config\.json says that the checkpoint is quantised, and no tensor is",
    ),
    (
        "another activation",
        _config(lambda c: c["ffn_config"].update(ffn_act_fn={"name": "gelu"})),
        CheckpointError,
        r"activation is 'gelu'; moectl runs 'silu' only",
    ),
    ("no config", lambda d: (d / "config.json").unlink(), CheckpointError, r"no config\.json"),
    (
        "config cut",
        lambda d: os.truncate(d / "config.json", 40),
        CheckpointError,
        r"config\.json is not valid JSON",
    ),
    ("config a list", lambda d: (d / "config.json").write_text("[]"), CheckpointError, r"not a JSON object"),
    (
        "index names a missing file",
        lambda d: (d / SECOND).unlink(),
        CheckpointError,
        rf"'{SECOND}', and there is no",
    ),
    (
        "index leads outside",
        _index(lambda i: i["weight_map"].update({"lm_head.weight": "../m/" + FIRST})),
        CheckpointError,
        r"there is no such file",
    ),
    ("index without a map", _index(lambda i: i.clear()), CheckpointError, r"has no weight_map"),
    ("pickles only", _pickles, CheckpointError, r"no safetensors weights"),
    ("truncated", _truncate, IntegrityError, rf"{SECOND} is damaged: its header does not fit"),
    ("too long", _append, IntegrityError, rf"{SECOND} is damaged: its header does not fit"),
    (
        "empty file",
        lambda d: os.truncate(d / SECOND, 0),
        IntegrityError,
        rf"{SECOND} is damaged: it has no header",
    ),
    (
        "absurd header",
        lambda d: (d / SECOND).write_bytes(struct.pack("<Q", 1 << 62) + b"{}"),
        IntegrityError,
        rf"{SECOND} is damaged: its header claims {1 << 62} bytes of a file of 10",
    ),
    (
        "header not JSON",
        lambda d: (d / SECOND).write_bytes(struct.pack("<Q", 8) + b"notjson!"),
        IntegrityError,
        rf"{SECOND} is damaged",
    ),
    ("offsets that do not fit", _change(data_offsets=[0, 8]), IntegrityError, rf"{SECOND} is damaged"),
    ("negative offsets", _change(data_offsets=[-8, 8]), IntegrityError, rf"{SECOND} is damaged"),
]


@pytest.mark.parametrize(("damage", "kind", "message"), [pytest.param(*d[1:], id=d[0]) for d in DAMAGES])
def test_damage_is_one_clear_error(
    tmp_path: Path, damage: Callable[[Path], object], kind: type[MoectlError], message: str
) -> None:
    directory = write_checkpoint(tmp_path / "m", **SMALL)
    damage(directory)
    with pytest.raises(MoectlError, match=message) as caught:
        draw(open_checkpoint(str(directory)))
    assert type(caught.value) is kind
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_experts_per_tok", 9, "a mixtral model cannot run as config.json describes it: [argpartition]"),
        ("num_attention_heads", 0, "config.json does not describe a model that mlx-lm can build: mixtral: integer"),
    ],
)
def test_a_config_with_which_the_model_cannot_run_is_refused(
    tmp_path: Path, key: str, value: int, message: str
) -> None:
    directory = write_layout(tmp_path, "mixtral")
    edit_json(directory / "config.json", lambda c: c.update({key: value}))
    with pytest.raises(CheckpointError) as caught:
        draw(open_checkpoint(str(directory)))
    assert caught.value.message.startswith(message)
    assert caught.value.hint == "compare config.json with the one of the original repository"


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_a_quantised_matrix_needs_all_its_parts(tmp_path: Path, part: str) -> None:
    directory = write_checkpoint(tmp_path / "m", layout="mlx-quantized", files=1, **SMALL)
    file = directory / "model.safetensors"
    edit_header(file, lambda h: h.update({"gone": h.pop(f"lm_head.{part}")}))
    with pytest.raises(CheckpointError, match=r"(give the parameter|gives) lm_head\.(scales|biases)"):
        draw(open_checkpoint(str(directory)))
    edit_json(directory / "config.json", lambda c: c.pop("quantization"))
    with pytest.raises(CheckpointError, match=r"gives .*(scales|biases).*, and the model has no such parameter"):
        draw(open_checkpoint(str(directory)))


@pytest.mark.parametrize("source", ["./gone", "/gone/far", "~/gone-for-ever", "a/b/c", ""])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(source: str) -> None:
    with pytest.raises(CheckpointError, match="there is no directory"):
        open_checkpoint(source)


def test_files_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, files=2, **SMALL)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    with open_checkpoint(str(tmp_path)) as opened:
        usual = opened.config, opened.stored
    for name in ("config.json", "generation_config.json", INDEX):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    with open_checkpoint(str(tmp_path)) as opened:
        assert (opened.config, opened.stored) == usual


def test_a_file_and_a_shard_set_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "moectl.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(str(tmp_path / "moectl.json"))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tmp_path))
    assert "shard set" in str(caught.value.hint)
    (tmp_path / "moectl.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json") as caught:
        open_checkpoint(str(tmp_path))
    assert "config.json and the weights" in str(caught.value.hint)


def test_a_revision_of_a_plain_directory_is_refused_and_the_hint_mends_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dbrx", **SMALL)
    with pytest.raises(UsageError, match=r"--revision v2: .* is a directory") as refused:
        open_checkpoint(str(tmp_path / "dbrx"), revision="v2")
    assert refused.value.hint == "leave --revision out, or name a repository of the Hub"
    open_checkpoint(str(tmp_path / "dbrx")).close()


def test_a_directory_that_changes_is_noticed(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m", **SMALL)
    opened = open_checkpoint(str(directory))
    os.truncate(directory / FIRST, 10)
    with pytest.raises(IntegrityError, match="was changed or removed"):
        opened.path(FIRST)


_relaxed = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint that each Hypothesis example damages and puts right again."""
    return write_checkpoint(tmp_path_factory.mktemp("victim") / "m", layout="v2", files=1, **SMALL)


def _open_or_refuse(directory: Path) -> None:
    """Nothing but MoectlError, or a checkpoint all of whose bytes are there."""
    try:
        opened = open_checkpoint(str(directory))
        blueprint = draw(opened)
    except MoectlError:
        return
    for name, array in blueprint.skeleton.parameters.items():
        assert blueprint.parameters[name].shape == array.shape
    for t in (opened.stored[name] for name in sources(blueprint.parameters.values())):
        assert 8 <= t.offset <= t.offset + math.prod(t.shape) * item_bytes(t.dtype) <= opened.sizes[t.file]


@_relaxed
@given(
    edits=st.lists(st.tuples(st.integers(0, 2600), st.integers(0, 255)), max_size=4),
    cut=st.none() | st.integers(0, 4000),
)
def test_damaged_header_bytes_never_surprise(victim: Path, edits: list[tuple[int, int]], cut: int | None) -> None:
    file = victim / "model.safetensors"
    whole = file.read_bytes()
    data = bytearray(whole)
    for at, value in edits:
        data[at] = value
    try:
        file.write_bytes(bytes(data[:cut]))
        _open_or_refuse(victim)
    finally:
        file.write_bytes(whole)


@_relaxed
@given(tensor=st.integers(0, 12), key=st.sampled_from(["dtype", "shape", "data_offsets", None]), value=json_values)
def test_nonsense_in_a_header_never_surprises(victim: Path, tensor: int, key: str | None, value: Any) -> None:
    file = victim / "model.safetensors"
    whole = file.read_bytes()

    def edit(header: dict[str, Any]) -> None:
        name = sorted(header)[1 + tensor]
        if key is None:
            header[name] = value
        else:
            header[name][key] = value

    try:
        edit_header(file, edit)
        _open_or_refuse(victim)
    finally:
        file.write_bytes(whole)


@_relaxed
@given(path=st.sampled_from(["config.json", INDEX]), key=st.integers(0, 30), value=json_values)
def test_nonsense_in_config_or_index_never_surprises(victim: Path, path: str, key: int, value: Any) -> None:
    config, index = victim / "config.json", victim / INDEX
    kept = config.read_bytes()
    try:
        if path == INDEX:
            index.write_text(json.dumps(value if key % 2 else {"weight_map": {"lm_head.weight": value}}))
            (victim / "model.safetensors").rename(victim / "part.safetensors")
        else:
            flat = json.loads(kept)
            places = [(flat, k) for k in flat] + [(flat[p], k) for p in ("attn_config", "ffn_config") for k in flat[p]]
            where, name = places[key % len(places)]
            where[name] = value
            flat["quantization"] = value if key == 30 else None
            config.write_text(json.dumps(flat))
        _open_or_refuse(victim)
    finally:
        config.write_bytes(kept)
        if index.exists():
            index.unlink()
            (victim / "part.safetensors").rename(victim / "model.safetensors")


def test_the_activation_may_be_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m", **SMALL)
    for act in ({"name": "silu"}, "silu", None):
        edit_json(directory / "config.json", lambda c, act=act: c["ffn_config"].update(ffn_act_fn=act))  # type: ignore[misc]
        draw(open_checkpoint(str(directory)))


# The Hub, over real HTTP, with the real client in a process of its own.


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf-home")


@pytest.fixture(scope="module")
def client(hub: Hub, home: Path) -> Iterator[ProcessPoolExecutor]:
    with hub_client.start_client({"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home)}) as pool:
        yield pool


@pytest.fixture
def repo(hub: Hub, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A repository of four weight files under a name of its own."""
    hub.forget()
    directory = write_checkpoint(tmp_path / "served", layout="v2", files=4, **{**SMALL, "vocab_size": 1024})
    for name in ("modeling_dbrx.py", "pytorch_model.bin", "README.md"):
        (directory / name).write_text("never asked for")
    name = "dbrx/" + str(request.node.name).translate(str.maketrans("[]", "--")).rstrip("-")[:60]
    hub.add(name, directory)
    return name


def weights(hub: Hub, repo: str) -> dict[str, str]:
    """Return the SHA-256 of every weight file of a repository."""
    listing = hub.repos[repo].listing
    return {str(d["rfilename"]): str(d["lfs"]["sha256"]) for d in listing if ".safetensors" in d["rfilename"][-12:]}


def work_root(hub: Hub, repo: str, tmp_path: Path) -> Path:
    """Make the directory to which a repository's weights are downloaded under `tmp_path`/work."""
    root = tmp_path / "work" / f"{repo.replace('/', '--')}-{hub.repos[repo].commit[:12]}"
    root.mkdir(parents=True)
    return root


def test_weights_come_file_by_file(
    hub: Hub, client: ProcessPoolExecutor, home: Path, repo: str, tmp_path: Path
) -> None:
    report = client.submit(hub_client.fetch, repo, tmp_path / "work").result()
    served = hub.repos[repo]
    assert report.hashes == weights(hub, repo)
    assert report.revision == served.commit
    sizes = sorted(len(served.files[f]) for f in report.hashes)
    assert 0 < report.peak_bytes <= sizes[-1] + sizes[-2]
    assert report.left == []
    assert not (tmp_path / "work").exists()
    assert {f: p[-1] for f, p in report.progress.items()} == {
        f: (len(served.files[f]), len(served.files[f])) for f in report.hashes
    }
    for file in ("modeling_dbrx.py", "pytorch_model.bin", "README.md"):
        assert not hub.asked(file) + hub.asked(file, "HEAD")
    assert not list(home.rglob(f"*{repo.split('/')[1]}*/**/*.safetensors"))
    # The commit is pinned: only config.json is asked for by the branch's name.
    by_branch = [r.path for r in hub.requests if "/resolve/main/" in r.path]
    assert all(path.endswith("config.json") for path in by_branch)


def test_headers_are_read_by_range_requests(hub: Hub, client: ProcessPoolExecutor, repo: str) -> None:
    client.submit(hub_client.only_open, repo).result()
    asked = hub.asked(".safetensors")
    assert {r.path.rsplit("/", 1)[1] for r in asked} >= set(weights(hub, repo))
    assert all(r.range is not None for r in asked if not r.path.endswith(".json"))


def test_a_long_header_takes_a_second_request(hub: Hub, client: ProcessPoolExecutor, tmp_path: Path) -> None:
    hub.forget()
    directory = write_checkpoint(tmp_path / "m", files=1, **SMALL)
    edit_header(directory / "model.safetensors", lambda h: h["__metadata__"].update(note="n" * 100_000))
    hub.add("dbrx/long-header", directory)
    assert client.submit(hub_client.only_open, "dbrx/long-header").result().tensors == 11
    assert len(hub.asked("model.safetensors")) == 2


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_connection_is_resumed(
    hub: Hub, client: ProcessPoolExecutor, repo: str, tmp_path: Path, reset: bool
) -> None:
    client.submit(hub_client.only_open, repo).result()
    hub.forget()
    file = max(weights(hub, repo), key=lambda f: len(hub.repos[repo].files[f]))
    header, cut = Fault(file, cut_after=None), 3 * hub_client.CHUNK_BYTES
    hub.faults += [header, Fault(file, cut_after=cut, reset=reset)]
    report = client.submit(hub_client.fetch, repo, tmp_path / "work").result()
    assert report.hashes == weights(hub, repo)
    resumed = [r.range for r in hub.asked(file)][2:]
    assert len(resumed) == 1
    assert resumed[0] is not None
    start = int(resumed[0].removeprefix("bytes=").rstrip("-"))
    assert 0 < start <= cut


def test_a_killed_download_is_resumed(
    hub: Hub, client: ProcessPoolExecutor, home: Path, repo: str, tmp_path: Path
) -> None:
    file = min(weights(hub, repo))
    hub.faults += [Fault(file), Fault(file, cut_after=3 * hub_client.CHUNK_BYTES, stall=True)]
    script = (
        "import sys; from pathlib import Path; from tests.support import hub_client\n"
        "hub_client.enter({'HF_ENDPOINT': sys.argv[1], 'HF_HOME': sys.argv[2]})\n"
        "hub_client.fetch(sys.argv[3], Path(sys.argv[4]))\n"
    )
    arguments = [hub.endpoint, str(home), repo, str(tmp_path / "work")]
    with subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=Path(__file__).parent.parent.parent) as child:
        assert hub.stalled.wait(60)
        partial = tmp_path / "work"
        while not any(p.stat().st_size for p in partial.rglob("*.partial")):
            assert child.poll() is None
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    hub.go.set()
    kept = sum(p.stat().st_size for p in partial.rglob("*.partial"))
    report = client.submit(hub_client.fetch, repo, tmp_path / "work").result()
    assert report.hashes == weights(hub, repo)
    assert hub.asked(file)[-1].range == f"bytes={kept}-"
    assert report.left == []


def test_closing_leaves_a_partial_file_and_does_not_wait(
    hub: Hub, client: ProcessPoolExecutor, home: Path, repo: str, tmp_path: Path
) -> None:
    file = min(weights(hub, repo))
    hub.faults += [Fault(file), Fault(file, cut_after=3 * hub_client.CHUNK_BYTES, stall=True)]
    with hub_client.start_client({"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home)}) as other:
        left = other.submit(hub_client.abandon, repo, tmp_path / "work").result()
        assert left == [file + ".partial"]
    assert hub.stalled.is_set()  # that process has left although its connection still hangs
    assert not hub.go.is_set()
    hub.go.set()
    report = client.submit(hub_client.fetch, repo, tmp_path / "work").result()
    assert report.hashes == weights(hub, repo)
    assert int(str(hub.asked(file)[-1].range).removeprefix("bytes=").rstrip("-")) >= hub_client.CHUNK_BYTES


def test_ctrl_c_is_heard_while_headers_are_read(hub: Hub, home: Path, repo: str) -> None:
    """Connections that hang, and waits between retries, must not keep the program from leaving."""
    files = sorted(weights(hub, repo))
    hub.faults += [Fault(file, cut_after=10, stall=True) for file in files[:2]]
    hub.faults += [Fault(file, status=503, times=100) for file in files[2:]]
    script = (
        "import sys; from tests.support import hub_client; from moectl.shards.source import hub\n"
        "hub_client.enter({'HF_ENDPOINT': sys.argv[1], 'HF_HOME': sys.argv[2]})\n"
        "hub._RETRY_WAITS_S = (60.0,) * 4\n"
        "try: hub_client.only_open(sys.argv[3])\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    root = Path(__file__).parent.parent.parent
    arguments = [sys.executable, "-c", script, hub.endpoint, str(home), repo]
    with subprocess.Popen(arguments, cwd=root) as child:
        try:
            assert hub.stalled.wait(60)
            child.send_signal(signal.SIGINT)
            assert child.wait(20) == 130  # not 30 s for the connections and minutes for the retries
            assert not hub.go.is_set()
        finally:
            child.kill()
            hub.go.set()


def test_one_bad_header_ends_the_reading_of_others(hub: Hub, home: Path, repo: str) -> None:
    files = sorted(weights(hub, repo))
    hub.faults += [Fault(files[0], status=403), Fault(files[1], cut_after=10, stall=True)]
    with hub_client.start_client({"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home)}) as other:
        error = refused(other, hub_client.only_open, repo)
        assert type(error) is CheckpointError
        assert len(hub.asked(files[1])) <= 1  # its connection was not waited for: that would have been tried again
    hub.go.set()


def test_somebodys_file_in_the_work_directory_stays(
    hub: Hub, client: ProcessPoolExecutor, repo: str, tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine").write_text("mine")
    client.submit(hub_client.fetch, repo, tmp_path / "work").result()
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["mine"]


def test_a_damaged_partial_file_is_fetched_anew(
    hub: Hub, client: ProcessPoolExecutor, repo: str, tmp_path: Path
) -> None:
    file = min(weights(hub, repo))
    root = work_root(hub, repo, tmp_path)
    (root / (file + ".partial")).write_bytes(bytes(1000))
    (root / max(weights(hub, repo))).write_bytes(bytes(len(hub.repos[repo].files[max(weights(hub, repo))])))
    report = client.submit(hub_client.fetch, repo, tmp_path / "work").result()
    assert report.hashes == weights(hub, repo)
    assert [r.range for r in hub.asked(file)[-2:]] == ["bytes=1000-", None]
    assert report.left == []


def test_two_runs_do_not_write_to_one_file(hub: Hub, client: ProcessPoolExecutor, repo: str, tmp_path: Path) -> None:
    file = min(weights(hub, repo))
    with (work_root(hub, repo, tmp_path) / (file + ".partial")).open("ab") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        error = refused(client, hub_client.fetch, repo, tmp_path / "work")
    assert type(error) is StateError
    assert "another moectl is downloading" in error.message


def test_kept_sources_go_to_the_cache_and_stay(
    hub: Hub, client: ProcessPoolExecutor, home: Path, repo: str, tmp_path: Path
) -> None:
    report = client.submit(hub_client.fetch, repo, tmp_path / "work", keep_source=True).result()
    assert report.hashes == weights(hub, repo)
    assert all(Path(p).is_relative_to(home) and Path(p).exists() for p in report.paths.values())
    hub.forget()
    again = client.submit(hub_client.fetch, repo, tmp_path / "work").result()
    assert again.paths == report.paths
    assert all(Path(p).exists() for p in report.paths.values())
    assert not [r for r in hub.asked("/resolve/") if r.path.endswith(".safetensors")]
    assert not (tmp_path / "work").exists()


def refused(client: ProcessPoolExecutor, *arguments: Any, **keywords: Any) -> MoectlError:
    with pytest.raises(MoectlError) as caught:
        client.submit(*arguments, **keywords).result()
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(("token", "status"), [(None, "401"), ("hf_any", "404")])
def test_a_repository_that_is_not_there_names_mirrors(
    hub: Hub, client: ProcessPoolExecutor, token: str | None, status: str
) -> None:
    hub.forget()
    error = refused(client, hub_client.only_open, "databricks/dbrx-instruct", token)
    assert type(error) is CheckpointError
    assert status in error.message
    assert "alpindale/dbrx-instruct" in str(error.hint)


@pytest.mark.parametrize(("token", "status"), [(None, "401"), ("hf_any", "403")])
def test_a_gated_repository_names_its_licence_page(
    hub: Hub, client: ProcessPoolExecutor, repo: str, token: str | None, status: str
) -> None:
    hub.repos[repo].gated = True
    error = refused(client, hub_client.only_open, repo, token)
    assert type(error) is CheckpointError
    assert status in error.message
    assert f"https://huggingface.co/{repo}" in str(error.hint)
    assert "HF_TOKEN" in str(error.hint)
    assert client.submit(hub_client.only_open, repo, "hf_accepted").result().tensors


def test_a_revision_that_is_not_there(client: ProcessPoolExecutor, repo: str) -> None:
    error = refused(client, hub_client.only_open, repo, None, "v9")
    assert type(error) is CheckpointError
    assert "has no revision v9" in error.message


def test_a_name_that_is_no_repository(client: ProcessPoolExecutor) -> None:
    error = refused(client, hub_client.only_open, "what is this?")
    assert type(error) is CheckpointError
    assert "neither a directory nor a repository" in error.message


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_trouble_is_waited_out(
    hub: Hub, client: ProcessPoolExecutor, repo: str, tmp_path: Path, status: int
) -> None:
    last = max(weights(hub, repo))
    headers = {"Retry-After": "0"}
    hub.faults += [Fault("/api/models/", status=status, headers=headers, times=2)]
    hub.faults += [Fault(last, status=status, headers=headers), Fault(last)]  # its header, then its bytes
    hub.faults += [Fault(last, status=status, headers=headers)]
    report = client.submit(hub_client.fetch, repo, tmp_path / "work").result()
    assert report.hashes == weights(hub, repo)
    assert all(f.times == 0 for f in hub.faults)


@pytest.mark.parametrize("status", [429, 500])
def test_lasting_trouble_says_that_a_new_run_resumes(
    hub: Hub, client: ProcessPoolExecutor, repo: str, status: int
) -> None:
    hub.faults += [Fault("/api/models/", status=status, headers={"Retry-After": "0"}, times=100)]
    error = refused(client, hub_client.only_open, repo)
    assert type(error) is Unreachable
    assert str(status) in error.message
    assert "resumes" in str(error.hint)


def test_a_long_rate_limit_is_told_not_waited_for(hub: Hub, client: ProcessPoolExecutor, repo: str) -> None:
    hub.faults += [Fault("/api/models/", status=429, headers={"Retry-After": "3000"}, times=100)]
    error = refused(client, hub_client.only_open, repo)
    assert "in 3000 s" in str(error.hint)
    assert len(hub.asked("/api/models/")) == 1


@pytest.mark.parametrize("keep_source", [False, True])
def test_wrong_bytes_are_refused_and_not_kept(
    hub: Hub, client: ProcessPoolExecutor, repo: str, tmp_path: Path, keep_source: bool
) -> None:
    file = min(weights(hub, repo))
    good = hub.repos[repo].files[file]
    hub.repos[repo].files[file] = good[:-1] + bytes([good[-1] ^ 1])
    error = refused(client, hub_client.fetch, repo, tmp_path / "work", keep_source=keep_source)
    assert type(error) is IntegrityError
    assert file in error.message
    assert not list((tmp_path / "work").rglob("*.*"))
    hub.repos[repo].files[file] = good
    report = client.submit(hub_client.fetch, repo, tmp_path / "work", keep_source=keep_source).result()
    assert report.hashes == weights(hub, repo)


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (
            lambda d: os.truncate(d / SECOND, 30_000),
            IntegrityError,
            "its header does not fit its 30000 bytes",
        ),
        (lambda d: (d / SECOND).write_bytes(b"\xff" * 64), IntegrityError, "its header claims"),
        (lambda d: (d / SECOND).unlink(), CheckpointError, "and there is no such file"),
        (_pickles, CheckpointError, "no safetensors weights"),
        (_config(lambda c: c.update(vocab_size=77)), CheckpointError, "wte.weight has shape"),
        (_drop("transformer.blocks.0.ffn.experts.mlp.w1"), CheckpointError, "does not give the parameter"),
        (lambda d: (d / "config.json").write_text("{"), CheckpointError, "not valid JSON"),
    ],
    ids=["truncated", "absurd", "missing-file", "pickles", "shape", "tensor", "config"],
)
def test_a_bad_repository_is_refused_by_its_headers(
    hub: Hub,
    client: ProcessPoolExecutor,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    damage: Callable[[Path], object],
    kind: type[MoectlError],
    message: str,
) -> None:
    hub.forget()
    directory = write_checkpoint(tmp_path / "m", **SMALL)
    damage(directory)
    name = f"dbrx/bad-{request.node.callspec.id}"
    hub.add(name, directory)
    error = refused(client, hub_client.fetch, name, tmp_path / "work")
    assert type(error) is kind
    assert message in error.message
    assert all(r.range for r in hub.asked("/resolve/") if r.path.endswith(".safetensors"))
    assert not (tmp_path / "work").exists()


def test_offline_runs_use_the_cache(hub: Hub, client: ProcessPoolExecutor, home: Path, repo: str) -> None:
    snapshot = client.submit(hub_client.pull, repo).result()
    assert {p.name for p in snapshot.iterdir()} >= {
        *weights(hub, repo),
        "LICENSE",
        "tokenizer_config.json",
        INDEX,
    }
    hub.forget()
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    with hub_client.start_client(environment) as offline:
        report = offline.submit(hub_client.only_open, repo).result()
        assert (report.revision, report.tensors) == (hub.repos[repo].commit, 14)
        error = refused(offline, hub_client.only_open, "alpindale/dbrx-instruct")
        assert type(error) is Unreachable
        assert "HF_HUB_OFFLINE is set" in error.message
        (snapshot / min(weights(hub, repo))).unlink()
        error = refused(offline, hub_client.only_open, repo)
        assert type(error) is Unreachable
        assert min(weights(hub, repo)) in error.message
        assert "unset HF_HUB_OFFLINE" in str(error.hint)
    assert hub.requests == []


def test_a_repository_that_is_gone_opens_from_the_cache(hub: Hub, client: ProcessPoolExecutor, repo: str) -> None:
    client.submit(hub_client.pull, repo).result()
    commit = hub.repos.pop(repo).commit
    assert client.submit(hub_client.only_open, repo).result().revision == commit
    assert {r.path for r in hub.requests[-1:]} == {f"/api/models/{repo}"}


def test_nothing_is_printed_and_no_network_is_one_error(hub: Hub, home: Path, repo: str, tmp_path: Path) -> None:
    last = max(weights(hub, repo))
    hub.faults += [Fault("/api/models/", status=500), Fault("config.json", method="HEAD", status=503)]
    hub.faults += [
        Fault(last),
        Fault(last, cut_after=hub_client.CHUNK_BYTES, headers={"X-HF-Warning": "a; be warned"}),
    ]
    script = (
        "import sys; from pathlib import Path; from tests.support import hub_client\n"
        "hub_client.enter({'HF_ENDPOINT': sys.argv[1], 'HF_HOME': sys.argv[2]})\n"
        "hub_client.fetch(sys.argv[3], Path(sys.argv[4]))\n"
        "hub_client.fetch(sys.argv[3], Path(sys.argv[4]), keep_source=True)\n"
    )
    root = Path(__file__).parent.parent.parent
    arguments = [hub.endpoint, str(tmp_path / "home"), repo, str(tmp_path / "work")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=root, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
    with hub_client.start_client({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "h")}) as lost:
        error = refused(lost, hub_client.only_open, repo)
        assert type(error) is Unreachable
        assert "did not come" in error.message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is a device of Linux")
def test_a_full_disk_is_one_clear_error(hub: Hub, client: ProcessPoolExecutor, repo: str, tmp_path: Path) -> None:
    root = work_root(hub, repo, tmp_path)
    (root / (min(weights(hub, repo)) + ".partial")).symlink_to("/dev/full")
    error = refused(client, hub_client.fetch, repo, tmp_path / "work")
    assert type(error) is StateError
    assert "the disk is full" in error.message


def test_free_space_is_checked_first(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"model needs 1000000000\.0 GB, and .* free"):
        _require_space(tmp_path / "not" / "yet", 10**18, "model")
