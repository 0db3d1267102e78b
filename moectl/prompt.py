"""Turn what a request says into the tokens the model reads, or say why that cannot be; the same on every rank."""

from __future__ import annotations

from moectl.errors import BadField
from moectl.request import Request, too_long
from moectl.shards.tokenizer import Tokenizer

_WITHOUT_TEMPLATE = "send the text as it is: moectl run --raw, or /v1/completions"


def read_prompt(request: Request, tokenizer: Tokenizer, *, vocab_size: int, max_seq_len: int) -> list[int]:
    """Return a request's prompt as tokens, without those of its answer so far.

    Raises BadField where there are none or too many, or where a token is none of the model's.
    """
    tokens = _tokenize(request, tokenizer)
    if not tokens:
        raise BadField(
            "the prompt is empty: this model adds no start token", hint="give some text", param=request.source
        )
    for what, param, ids in (
        ("a prompt token", request.source, tokens),
        ("a token of the answer", None, request.answered),
        ("a token of the logit bias", "logit_bias", [token for token, _ in request.logit_bias]),
    ):
        if not all(0 <= token < vocab_size for token in ids):
            raise BadField(f"{what} should be in the model's vocabulary of {vocab_size}, it is outside", param=param)
    if len(tokens) >= max_seq_len:  # an answer that is resumed may fill the context: it ends there, as any other does
        raise too_long(f"the prompt has {len(tokens)} tokens, the model's context is {max_seq_len}", request.source)
    return tokens


def measure_reach(request: Request, prompt_tokens: int, *, max_seq_len: int, kv_tokens: int | None) -> int:
    """Return up to how many tokens prompt and answer may get: what is asked for, as far as context and memory allow.

    Raises BadField when there is no memory for the prompt and one more token.
    """
    if kv_tokens is not None and prompt_tokens >= kv_tokens:
        raise too_long(f"the prompt has {prompt_tokens} tokens, and there is memory for {kv_tokens}", request.source)
    return min(prompt_tokens + request.max_tokens, max_seq_len, kv_tokens or max_seq_len)


def _tokenize(request: Request, tokenizer: Tokenizer) -> list[int]:
    if request.prompt_tokens is not None:
        return list(request.prompt_tokens)
    if request.raw:
        return tokenizer.encode(request.prompt)
    if not tokenizer.has_chat_template:
        raise BadField("this model has no chat template", hint=_WITHOUT_TEMPLATE, param=request.source)
    if request.messages is not None:
        messages = list(request.messages)
    else:
        messages = [{"role": "system", "content": request.system}] if request.system is not None else []
        messages.append({"role": "user", "content": request.prompt})
    try:
        return tokenizer.encode_chat(messages)
    except BadField:
        raise
    except Exception as error:  # the template is the model's own program
        reason = " ".join(str(error).split())
        raise BadField(
            f"the model's chat template fails: {reason}", hint=_WITHOUT_TEMPLATE, param=request.source
        ) from None
