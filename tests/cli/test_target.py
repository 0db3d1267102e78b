"""What the flags of run, serve and bench make, and what they refuse."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from moectl.cli.options import target_options
from moectl.cli.target import PARANOIA, run_options
from moectl.cli.verbs import run as run_verb
from moectl.engine.protocol import RunOptions
from tests.cli.test_cli import run

FLAGS = {
    "--backend": "ring",
    "--start-timeout": "7",
    "--dtype": "float16",
    "--prefill-step": "16",
    "--speculate": "3",
    "--force": None,
    "--no-canary": None,
    "--agree-routing": None,
    "--paranoia": None,
}


def read(*words: str) -> RunOptions:
    seen: list[RunOptions] = []

    @click.command()
    @target_options
    def command(**flags: Any) -> None:
        seen.append(run_options(flags))

    CliRunner().invoke(command, words, catch_exceptions=False)
    return seen[0]


def test_every_flag_of_a_run_reaches_the_options() -> None:
    words = [word for pair in FLAGS.items() for word in pair if word is not None]
    assert read(*words) == RunOptions(
        backend="ring",
        start_timeout_s=7,
        dtype="float16",
        prefill_step=16,
        speculate=3,
        force=True,
        canary=False,
        agree_routing=True,
        paranoia=PARANOIA,
    )


def test_without_flags_the_options_are_the_default_ones() -> None:
    assert read() == RunOptions()


@pytest.mark.parametrize("flag", ["--temp", "--top-p"])
def test_what_is_no_number_is_refused_before_a_model_is_loaded(
    flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(*_: Any) -> None:
        raise AssertionError("a model was chosen")

    monkeypatch.setattr(run_verb, "choose_target", choose)
    code, _, said = run(capsys, monkeypatch, "run", "--keep-alive", "0", flag, "nan", "hello")
    assert code == 2, said
    assert "it is nan" in said
