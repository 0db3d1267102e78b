"""What moectl relies on inside mlx-lm and MLX, beyond what they promise: look here when their versions change."""

from __future__ import annotations

import inspect
import io
from importlib.metadata import requires
from typing import Any

import mlx.core as mx
from mlx_lm.chat_templates import deepseek_v32, muse_spark
from mlx_lm.generate import BatchGenerator, PromptProcessingBatch, TextStateMachine
from mlx_lm.models import cache, gated_delta, ssm, switch_layers
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import MODEL_ARCHITECTURE_REMAPPING, MODEL_REMAPPING, _get_classes

from moectl.shards.chat.chat_template import _Bare
from moectl.shards.chat.thinking import ANSWER, THINKING
from moectl.shards.look.skeleton import make_skeleton
from tests.support.families import config_of
from tests.support.vocabularies import make_cl100k


def test_mlx_lm_is_pinned_to_a_minor_version() -> None:
    assert any(line.startswith("mlx-lm") and "<0.33" in line for line in requires("moectl") or ())


def test_names_of_model_files() -> None:
    assert MODEL_REMAPPING["kimi_k2"] == "deepseek_v3"
    assert MODEL_ARCHITECTURE_REMAPPING
    model, args = _get_classes({"model_type": "mixtral"})
    assert hasattr(args, "from_dict")
    assert isinstance(model.layers, property)


def test_stacks_of_experts_are_called_with_states_and_indices() -> None:
    for kind in (switch_layers.SwitchGLU, switch_layers.SwitchMLP):
        assert list(inspect.signature(kind.__call__).parameters) == ["self", "x", "indices"]


def test_stacked_matrices_are_called_one_by_one() -> None:
    for kind in (switch_layers.SwitchLinear, switch_layers.QuantizedSwitchLinear):
        assert list(inspect.signature(kind.__call__).parameters) == ["self", "x", "indices", "sorted_indices"]


def test_the_generator_gives_rows_back_between_prompt_and_answer() -> None:
    assert list(inspect.signature(BatchGenerator.extract_cache).parameters) == ["self", "uids"]
    response = PromptProcessingBatch.Response(0, (1, 2), True, False)
    assert (response.end_of_segment, response.end_of_prompt) == (True, False)
    for kind in (cache.KVCache, cache.RotatingKVCache, cache.ArraysCache, cache.CacheList):
        assert hasattr(kind, "merge")
    assert not hasattr(cache.ChunkedKVCache, "merge")  # it then could have a batch


def test_linear_attention_and_state_spaces_have_one_function_each() -> None:
    """`working` lets them make what they leave, without a loop over the prompt."""
    first = ["q", "k", "v", "g", "beta", "state", "mask"]
    assert list(inspect.signature(gated_delta.gated_delta_ops).parameters) == first
    assert "gated_delta_ops(" in inspect.getsource(gated_delta.gated_delta_update)
    second = ["x", "A_log", "B", "C", "D", "dt", "dt_bias", "state"]
    assert list(inspect.signature(ssm.ssm_attn).parameters)[:8] == second


def test_mlx_writes_a_graph_down_with_shapes() -> None:
    told: list[dict[str, Any]] = []
    mx.export_function(told.append, lambda x: [x @ x], mx.zeros((3, 3)))
    assert [one["type"] for one in told] == ["inputs", "keyword_inputs", "outputs", "constants", "primitive"]
    assert (told[-1]["name"], told[-1]["outputs"][0][1]) == ("Matmul", (3, 3))


def test_blocks_sum_by_themselves_over_their_sharding_group() -> None:
    block = make_skeleton(config_of("deepseek_v3")).layers[-1].mlp
    assert block.sharding_group is None
    assert "mx.distributed.all_sum(" in inspect.getsource(type(block).__call__)


def test_caches() -> None:
    assert issubclass(cache.KVCache, cache._BaseCache)
    for kind, name in ((cache.KVCache(), "keys"), (cache.RotatingKVCache(8), "keys"), (cache.ArraysCache(2), "cache")):
        assert hasattr(kind, name)
    assert cache.RotatingKVCache(8).max_size == 8
    assert len(cache.CacheList(cache.KVCache(), cache.KVCache()).caches) == 2
    skeleton = make_skeleton(config_of("nemotron_h"))
    assert len(make_prompt_cache(skeleton.model)) < len(skeleton.layers)  # a model makes its own


def test_what_marks_thinking() -> None:
    tokens = _Bare(make_cl100k("<think>", "</think>"), "", {})
    wrapper = TokenizerWrapper(tokens, lambda _: None)
    assert (wrapper.has_thinking, wrapper.think_start, wrapper.think_end) == (True, "<think>", "</think>")
    assert wrapper.structural_markers == ()
    state = TextStateMachine({ANSWER: [("<", THINKING)], THINKING: [(">", ANSWER)]}).make_state()
    state, parts = TextStateMachine.split(state, "a<b>c<d")
    assert parts == [(ANSWER, "a"), (THINKING, "b"), (ANSWER, "c"), (THINKING, "d")]
    assert state[0] == THINKING
    assert TextStateMachine.flush(state)[1:] == ("", THINKING)
    form = muse_spark.RESPONSE_FORMAT
    assert form["initial_state"] in form["transitions"]


def test_templates_are_asked_to_think_where_the_model_has_markers() -> None:
    source = inspect.getsource(TokenizerWrapper.apply_chat_template)
    assert "kwargs[self._thinking_kwarg] = self.has_thinking" in source
    assert "enable_thinking" in inspect.getsource(deepseek_v32.apply_chat_template)


def test_mlx_draws_its_graph() -> None:
    drawing, one = io.StringIO(), mx.zeros((2,))
    mx.export_to_dot(drawing, one + 1, **{"a name": one})
    assert '"a name" ->' in drawing.getvalue()
