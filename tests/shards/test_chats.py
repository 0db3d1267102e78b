"""A family's own files say what ends an answer and what a prompt is: compared with transformers and mlx-lm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from mlx_lm.utils import load_config, load_tokenizer
from transformers import AutoTokenizer, GenerationConfig

from moectl.shards.chat.tokenizer import open_tokenizer
from tests.support.chats import FAMILIES, write_family

TALKS: dict[str, list[dict[str, str]]] = {
    "question": [{"role": "user", "content": "2+2?"}],
    "system": [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": " héllo 世界 "}],
    "later": [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "I add."},
        {"role": "user", "content": "Say <think> and [INST]."},
    ],
    "wrong": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "late": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
}
MENDED = [{"role": "user", "content": "a\n\nb"}]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in made:
            made[name] = write_family(tmp_path_factory.mktemp(name), name)
        return made[name]

    return write


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokens_that_end_an_answer(write: Callable[[str], Path], name: str) -> None:
    directory, family = write(name), FAMILIES[name]
    ends = open_tokenizer(directory).eos_token_ids
    assert ends == family.ends
    told = load_config(directory).get("eos_token_id")
    assert ends == load_tokenizer(directory, eos_token_ids=told).eos_token_ids
    generated = GenerationConfig.from_pretrained(directory).eos_token_id
    assert ends >= set(generated if isinstance(generated, list) else [generated])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("think", [None, True, False], ids=["default", "on", "off"])
def test_prompts_are_those_of_transformers(
    write: Callable[[str], Path], name: str, talk: str, think: bool | None
) -> None:
    theirs, mine = AutoTokenizer.from_pretrained(write(name)), open_tokenizer(write(name))
    own = load_tokenizer(write(name))
    options: dict[str, Any] = {} if think is None else {"enable_thinking": think}
    for more in ({}, {"reasoning_effort": "high", "thinking": bool(think), "date_string": "30 Nov 2026"}):
        try:
            wanted = own.apply_chat_template(TALKS[talk], add_generation_prompt=True, **options, **more)
        except TemplateError as refusal:
            if talk == "late":  # the system's text is the user's where the template takes none
                wanted = own.apply_chat_template(MENDED, add_generation_prompt=True, **options, **more)
                assert mine.encode_chat(TALKS[talk], options={**options, **more}) == wanted
                continue
            with pytest.raises(TemplateError, match=str(refusal).replace("(", r"\(")):
                mine.encode_chat(TALKS[talk], options={**options, **more})
            continue
        assert mine.encode_chat(TALKS[talk], options={**options, **more}) == wanted
        shown = {"enable_thinking": own.has_thinking, **options, **more}  # what mlx-lm gives where nothing is said
        assert wanted == theirs.apply_chat_template(
            TALKS[talk], add_generation_prompt=True, return_dict=False, tokenize=True, **shown
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_thinking_is_switched_by_the_templates_own_option(write: Callable[[str], Path], name: str) -> None:
    tokenizer, family = open_tokenizer(write(name)), FAMILIES[name]
    talk = TALKS["question"]
    if name == "gpt_oss":  # levels, and no switch
        assert tokenizer.encode_chat(talk, True) == tokenizer.encode_chat(talk)
    elif family.thinks:
        assert tokenizer.encode_chat(talk, True) != tokenizer.encode_chat(talk, False)
        assert not tokenizer.stream_answer(tokenizer.encode_chat(talk, False)).is_thinking
    else:
        assert tokenizer.encode_chat(talk, False) == tokenizer.encode_chat(talk)
