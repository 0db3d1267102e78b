"""Families: read from the mlx-lm that is installed, with their splits, and the Macs that hold them; `moectl models`."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from moectl.cli.app import cli
from moectl.cli.options import Failed
from moectl.errors import MoectlError
from moectl.model.catalog import MODELS
from moectl.planner import families
from moectl.planner.families import FOUR_BITS, MLX_LM, TRANSFORMERS, find_family, find_smallest, list_families


def invoke(*words: str, width: int = 160) -> Result:
    return CliRunner().invoke(cli, ["models", *words], env={"COLUMNS": str(width)})


def test_all_families_of_mlx_lm_are_listed() -> None:
    found = {family.name: family for family in list_families()}
    assert len(found) > 120
    assert not {"base", "cache", "switch_layers"} & found.keys()
    assert found["deepseek_v3"].verified == TRANSFORMERS
    assert found["afmoe"].verified == MLX_LM
    assert found["gemma3n"].splits == ()
    assert found["llama"].splits == ("hidden", "tensor", "layers")


def test_a_new_model_file_is_shown_as_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_model_files", lambda: ["llama", "llama_next"])
    assert find_family("llama_next").verified == families.UNKNOWN
    assert "llama_next: splits none; not compared" in invoke("llama_next").stdout


def test_model_types_that_another_file_reads() -> None:
    assert find_family("kimi_k2").name == "deepseek_v3"
    assert find_family("mistral").name == "llama"


@pytest.mark.parametrize(
    ("model", "macs"),
    [
        ("meta-llama/Llama-3.2-3B-Instruct", (1, 16)),
        ("meta-llama/Llama-3.3-70B-Instruct", (1, 64)),
        ("databricks/dbrx-instruct", (1, 128)),
        ("moonshotai/Kimi-K2-Instruct", (2, 512)),  # six with 128 GB would do where each has macOS 26
    ],
)
def test_the_smallest_cluster(model: str, macs: tuple[int, int]) -> None:
    assert find_smallest(MODELS[model].quantised(FOUR_BITS)) == find_smallest(MODELS[model]) == macs


def test_the_command() -> None:
    text = invoke().stdout
    assert text.startswith("FAMILY ")
    assert "DeepSeek-V3" in text
    details = invoke("minimax_m2").stdout
    assert "minimax: splits experts, hidden, layers; compared with transformers" in details
    assert "Not --split tensor: it has no attention whose heads moectl knows how to divide." in details
    assert "2 × 96 GB" in details
    document = json.loads(invoke("llama", "--json").stdout)
    assert document["schema"] == "moectl.models/1"
    assert document["families"][0]["splits"] == ["hidden", "tensor", "layers"]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_table_never_wraps(width: int) -> None:
    assert all(len(line) <= width for line in invoke(width=width).stdout.splitlines()[:-1])


def test_an_unknown_family_gets_a_suggestion_and_its_hint_works() -> None:
    result = invoke("lama")
    assert isinstance(result.exception, Failed)
    error = result.exception.error
    assert isinstance(error, MoectlError)
    assert str(error) == "mlx-lm has no family 'lama'. Did you mean 'llama'?"
    assert error.hint == "moectl models lists all"
    assert invoke().exit_code == 0
