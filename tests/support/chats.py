"""Small files of ten families, with the keys that their repositories publish about end tokens, defaults and the like.

The Hub was out of reach when the numbers were written: some come from what public files repeat of them, some from
memory. The chat templates are this project's own: each writes the family's turns and uses what its published template
uses of Jinja, without tools. With the published templates of llama.cpp's collection and of others the same comparisons
were made by hand; they are not kept here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import vocabularies


@dataclass(frozen=True)
class Family:
    """What a repository says; `ends` is what ends an answer, `thinks` whether the template lets the model think."""

    tokens: dict[str, int]
    ends: set[int]
    template: str
    config: dict[str, Any]
    generation: dict[str, Any] | None
    tokenizer: dict[str, Any] = field(default_factory=dict)
    thinks: bool = False


FAMILIES = {
    "kimi_k2": Family(
        {"[BOS]": 163584, "[EOS]": 163585, "<|im_end|>": 163586, "<|im_user|>": 163587, "<|im_assistant|>": 163588}
        | {"<|im_system|>": 163594, "<|im_middle|>": 163601, "[PAD]": 163839},
        {163585, 163586},
        # A default system prompt; a macro.
        "{%- macro turn(role, name, text) -%}<|im_{{ role }}|>"
        "{{ name }}<|im_middle|>{{ text }}<|im_end|>{%- endmacro -%}"
        "{%- if messages[0].role != 'system' -%}{{ turn('system', 'system', 'You are Kimi.') }}{%- endif -%}"
        "{%- for m in messages -%}{{ turn(m.role, m.name or m.role, m.content) }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}",
        {"model_type": "kimi_k2", "bos_token_id": 163584, "eos_token_id": 163585},
        {"max_length": 131072, "eos_token_id": 163586},
        {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"},
    ),
    "glm4_moe": Family(
        {"<|endoftext|>": 151329, "[gMASK]": 151331, "<sop>": 151333, "<|system|>": 151335, "<|user|>": 151336}
        | {"<|assistant|>": 151337, "<|observation|>": 151338, "<think>": 151350, "</think>": 151351},
        {151329, 151336, 151338},
        # A namespace that finds the last question; thinking of earlier turns is dropped.
        "[gMASK]<sop>{%- set ns = namespace(last=-1) -%}"
        "{%- for m in messages -%}{%- if m.role == 'user' -%}"
        "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}<|assistant|>\n<think>"
        "{{- m.reasoning_content.strip() if loop.index0 > ns.last and m.reasoning_content is string else '' -}}"
        "</think>\n{{ m.content.strip() }}{%- else -%}<|{{ m.role }}|>\n{{ m.content }}"
        "{{- '/nothink' if m.role == 'user' and enable_thinking is defined and not enable_thinking else '' -}}"
        "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>"
        "{{- '\n<think></think>' if enable_thinking is defined and not enable_thinking else '' -}}{%- endif -%}",
        {"model_type": "glm4_moe", "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329},
        {"_from_model_config": True, "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329},
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        thinks=True,
    ),
    "gpt_oss": Family(
        {"<|startoftext|>": 199998, "<|endoftext|>": 199999, "<|return|>": 200002, "<|channel|>": 200005}
        | {"<|start|>": 200006, "<|end|>": 200007, "<|message|>": 200008, "<|call|>": 200012},
        {199999, 200002, 200012},
        # The date; the effort; the last answer ends in another way than earlier ones.
        "<|start|>system<|message|>You are ChatGPT.\nCurrent date: {{ strftime_now('%Y-%m-%d') }}\n\n"
        "Reasoning: {{ reasoning_effort if reasoning_effort is defined else 'medium' }}<|end|>"
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
        "{%- if m.thinking and loop.last and not add_generation_prompt -%}"
        "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{%- endif -%}"
        "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
        "{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' -}}"
        "{%- else -%}<|start|>{{ 'developer' if m.role == 'system' else m.role }}<|message|>{{ m.content }}<|end|>"
        "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}",
        {"model_type": "gpt_oss", "eos_token_id": 200002, "pad_token_id": 199999},
        {"bos_token_id": 199998, "do_sample": True, "eos_token_id": [200002, 199999, 200012], "pad_token_id": 199999},
        {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"},
        thinks=True,
    ),
    "qwen3_5_moe": Family(
        {"<|endoftext|>": 248044, "<|im_start|>": 248045, "<|im_end|>": 248046, "<think>": 248068, "</think>": 248069},
        {248044, 248046},
        # A loop with a step that is left early; a refusal.
        "{%- if not messages -%}{{ raise_exception('No messages provided.') }}{%- endif -%}"
        "{%- set ns = namespace(last=0) -%}{%- for m in messages[::-1] -%}{%- if m.role == 'user' -%}"
        "{%- set ns.last = messages|length - 1 - loop.index0 -%}{%- break -%}{%- endif -%}{%- endfor -%}"
        "{%- for m in messages -%}{%- if m.role == 'system' and not loop.first -%}"
        "{{ raise_exception('System message must be at the beginning.') }}{%- endif -%}"
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n"
        "{{ m.reasoning_content | default('', true) | trim }}\n</think>\n\n"
        "{% endif %}{{ m.content | trim }}<|im_end|>\n"
        "{% endfor %}{%- if add_generation_prompt -%}<|im_start|>assistant\n"
        "{{ '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false else '<think>\n' }}"
        "{%- endif -%}",
        {"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text", "eos_token_id": 248044}},
        {"do_sample": True, "eos_token_id": [248046, 248044], "pad_token_id": 248044, "temperature": 0.6, "top_k": 20},
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        thinks=True,
    ),
    "gemma3": Family(
        {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 105, "<end_of_turn>": 106},
        {1, 106},
        # The system message becomes a part of the first question; roles have to take turns.
        "{{ bos_token }}{%- if messages[0].role == 'system' -%}{%- set first = messages[0].content + '\n\n' -%}"
        "{%- set rest = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}"
        "{%- for m in rest -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{%- endif -%}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ (first if loop.first else '') + m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{%- if add_generation_prompt -%}<start_of_turn>model\n{%- endif -%}",
        {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": {"model_type": "gemma3_text"}},
        {"do_sample": True, "eos_token_id": [1, 106], "top_k": 64, "top_p": 0.95},
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
    ),
    "gemma4": Family(
        {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<|tool_response>": 50, "<|think|>": 98, "<|channel>": 100}
        | {"<channel|>": 101, "<|turn>": 105, "<turn|>": 106},
        {1, 50, 106},
        # Off unless it is turned on, which mlx-lm does; a macro that drops what was thought.
        "{%- macro answer(text) -%}{%- set ns = namespace(said='') -%}{%- for part in text.split('<channel|>') -%}"
        "{%- set ns.said = ns.said + part.split('<|channel>')[0] -%}{%- endfor -%}{{ ns.said | trim }}{%- endmacro -%}"
        "{{ bos_token }}{%- set on = enable_thinking | default(false) -%}{%- set rest = messages -%}"
        "{%- if on or messages[0].role == 'system' -%}<|turn>system\n{{ '<|think|>\n' if on }}"
        "{%- if messages[0].role == 'system' -%}{{ messages[0].content | trim }}"
        "{%- set rest = messages[1:] -%}{%- endif -%}"
        "<turn|>\n{%- endif -%}"
        "{%- for m in rest -%}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ answer(m.content) if m.role == 'assistant' else m.content | trim }}<turn|>\n{% endfor %}"
        "{%- if add_generation_prompt -%}<|turn>model\n"
        "{{ '' if on else '<|channel>thought\n<channel|>' }}{%- endif -%}",
        {"model_type": "gemma4", "eos_token_id": [1, 106], "text_config": {"model_type": "gemma4_text"}},
        {"do_sample": True, "eos_token_id": [1, 106, 50], "temperature": 1.0, "top_k": 64, "top_p": 0.95},
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        thinks=True,
    ),
    "llama": Family(
        {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|start_header_id|>": 128006}
        | {"<|end_header_id|>": 128007, "<|eom_id|>": 128008, "<|eot_id|>": 128009},
        {128001, 128008, 128009},
        # The date again, as the older templates have it.
        "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
        "{%- endif %}{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
        "{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content']|trim }}{%- set messages = messages[1:] %}"
        "{%- endif %}{{- '<|eot_id|>' }}{%- for message in messages %}"
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        " + message['content'] | trim + '<|eot_id|>' }}"
        "{%- endfor %}{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
        {"model_type": "llama", "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]},
        {"do_sample": True, "eos_token_id": [128001, 128008, 128009], "temperature": 0.6, "top_p": 0.9},
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "deepseek_v3": Family(
        {"<｜begin▁of▁sentence｜>": 0, "<｜end▁of▁sentence｜>": 1, "<｜▁pad▁｜>": 2, "<｜User｜>": 128803}
        | {"<｜Assistant｜>": 128804, "<think>": 128798, "</think>": 128799},
        {1},
        # As DeepSeek-V3.1: an option of another name; what was thought is cut from the text of an answer.
        "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{% set ns = namespace(system='') %}"
        "{%- for m in messages %}{%- if m['role'] == 'system' %}"
        "{% set ns.system = ns.system + m['content'] %}{%- endif %}"
        "{%- endfor %}{{ bos_token }}{{ ns.system }}{%- for m in messages %}{%- if m['role'] == 'user' %}"
        "{{ '<｜User｜>' + m['content'] }}{%- elif m['role'] == 'assistant' %}{%- set content = m['content'] -%}"
        "{%- if '</think>' in content %}{%- set content = content.split('</think>', 1)[1] -%}{%- endif %}"
        "{{ '<｜Assistant｜></think>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor -%}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{{ '<think>' if thinking else '</think>' }}{% endif %}",
        {"model_type": "deepseek_v3", "bos_token_id": 0, "eos_token_id": 1},
        {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6},
        {
            "bos_token": {"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>", "normalized": True},
            "eos_token": {"__type": "AddedToken", "content": "<｜end▁of▁sentence｜>", "normalized": True},
            "pad_token": {"__type": "AddedToken", "content": "<｜▁pad▁｜>", "normalized": True},
        },
        thinks=True,
    ),
    "mistral": Family(
        {"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4, "[SYSTEM_PROMPT]": 17, "[/SYSTEM_PROMPT]": 18},
        {2},
        # A default system prompt; refusals.
        "{%- set default = 'You are Mistral Small.' %}{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
        "{%- set system = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}{%- else %}"
        "{%- set system = default %}{%- set loop_messages = messages %}{%- endif %}"
        "{{- '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}{%- for message in loop_messages %}"
        "{%- if message['role'] == 'user' %}{{- '[INST]' + message['content'] + '[/INST]' }}"
        "{%- elif message['role'] == 'assistant' %}{{- message['content'] + eos_token }}"
        "{%- else %}{{- raise_exception('Only user and assistant roles are supported here!') }}"
        "{%- endif %}{%- endfor %}",
        {"model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2},
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2},
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "smollm3": Family(
        {"<|endoftext|>": 128001, "<|im_start|>": 128011, "<|im_end|>": 128012, "<think>": 128002, "</think>": 128003},
        {128012, 128001},
        # What an assistant writes is marked for training; a loop that skips; JSON.
        "{%- set system = {'é': ['<', 1]} | tojson"
        "+ ' Reasoning Mode: ' + ('/think' if enable_thinking | default(true) else '/no_think') -%}"
        "<|im_start|>system\n{{ system }}<|im_end|>\n{%- for m in messages -%}"
        "{%- if m.role == 'system' -%}{%- continue -%}{%- endif -%}"
        "<|im_start|>{{ m.role }}\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% endfor %}"
        "{%- if add_generation_prompt -%}<|im_start|>assistant\n"
        "{{ '' if enable_thinking | default(true) else '<think>\n\n</think>\n' }}{%- endif -%}",
        {"model_type": "smollm3", "bos_token_id": 128000, "eos_token_id": 128012},
        {"do_sample": True, "eos_token_id": [128012, 128001], "temperature": 0.6, "top_p": 0.95},
        {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        thinks=True,
    ),
}


def write_family(directory: Path, name: str) -> Path:
    """Write a family's small files to a directory."""
    family = FAMILIES[name]
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **family.tokenizer,
    }
    (directory / "tokenizer.json").write_text(vocabularies.make_cl100k(numbered=family.tokens).to_str())
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (directory / "chat_template.jinja").write_text(family.template)
    (directory / "config.json").write_text(json.dumps(family.config))
    if family.generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(family.generation))
    return directory
