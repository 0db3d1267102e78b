"""Run mlx-lm's `sanitize` on tensors that are not there: each parameter becomes an expression over stored tensors.

`trace` replaces `mx` in mlx-lm's model files for the call, so that every array is an `Expression`. No weight is read
and no memory is taken. Reading a part of an expression is the business of `parts`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

import mlx.core as mx

from moectl.errors import CheckpointError, MoectlError
from moectl.model.config_keys import CORRECT

Shape = tuple[int, ...]

ANOTHER_COPY = "start from the 16-bit checkpoint, or from one that MLX has quantised (mlx-community on the Hub)"
_COMPLETE = "complete the download of this checkpoint"


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """Shape and type of an array; there is one object for each pair, so that `is` compares."""

    shape: Shape
    dtype: mx.Dtype


@cache
def form_of(shape: Shape, dtype: mx.Dtype) -> Form:
    """Return the form for a shape and a dtype; equal ones share one object."""
    return Form(shape, dtype)


class Hole(int):
    """The place of an input, by number, in the arguments of an operation."""


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """An operation with its arguments, without its inputs: all experts of a layer share one."""

    op: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    form: Form
    result: int | None = None  # which one, of an operation with several results
    constants: bool = False  # whether arrays that are there are among the arguments

    def run(self, inputs: Sequence[Any]) -> Any:
        """Return the result of the operation on real arrays."""
        done = self.op(*fill(self.args, inputs), **{k: fill(v, inputs) for k, v in self.kwargs.items()})
        return done if self.result is None else done[self.result]


class Expression:
    """An array that is not there: an operation and its inputs. It has what `sanitize` looks at: shape and type."""

    __slots__ = ("inputs", "name", "operation")

    def __init__(self, operation: Operation, inputs: tuple[Expression, ...]) -> None:
        self.operation = operation
        self.inputs = inputs

    @property
    def shape(self) -> Shape:
        return self.operation.form.shape

    @property
    def dtype(self) -> mx.Dtype:
        return self.operation.form.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.size

    @property
    def T(self) -> Any:
        return record(mx.transpose, self)

    def __getattr__(self, name: str) -> Any:
        method = getattr(mx.array, name, None)
        if name in ("item", "tolist"):
            raise _NeedsValues
        if name.startswith("_") or not callable(method):
            raise AttributeError(f"mlx's arrays have no {name} that can be recorded")
        return partial(record, method, self)

    def __iter__(self) -> Iterator[Any]:
        return (record(mx.array.__getitem__, self, i) for i in range(self.shape[0]))

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        raise _NeedsValues

    __hash__ = object.__hash__


class Stored(Expression):
    """A tensor of the checkpoint, read as its form says."""

    __slots__ = ()  # so that it can become another expression when `sanitize` changes it in place

    def __init__(self, name: str, form: Form) -> None:
        super().__init__(_load(form), ())
        self.name = name


class _NeedsValues(Exception):
    """A traced operation wants to know numbers, and there are none yet."""


_operations: dict[Any, Operation | tuple[Operation, ...]] = {}


def record(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the expression, or expressions, of a result. Raises what MLX raises for these shapes and types."""
    inputs: list[Expression] = []
    key = (op, *[_sign(a, inputs) for a in args], *[(k, _sign(v, inputs)) for k, v in kwargs.items()])
    found = _operations.get(key)
    if found is None:
        found = _infer(op, args, kwargs)
        if not _has(mx.array, (args, list(kwargs.values()))):  # the values of an array decide, and they may change
            _operations[key] = found
    if isinstance(found, tuple):
        return tuple(Expression(operation, tuple(inputs)) for operation in found)
    if _changes_nothing(found, inputs):
        return _again(inputs[0])
    return Expression(found, tuple(inputs))


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
_OTHERS = ("getitem", "neg", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge")


def _add_operators() -> None:
    for name in (*_OTHERS, *[prefix + operator for operator in _BINARY for prefix in ("", "r", "i")]):
        operator = getattr(mx.array, f"__{name}__", None)
        if operator is not None:
            method = _change if name.startswith("i") and name != "invert" else record
            setattr(
                Expression,
                f"__{name}__",
                lambda self, *args, _method=method, _operator=operator: _method(_operator, self, *args),
            )


def _change(op: Callable[..., Any], self: Expression, *args: Any) -> Expression:
    """Change an array in place: under whatever names it is known."""
    made = record(op, _again(self), *args)
    self.__class__ = Expression
    self.operation, self.inputs = made.operation, made.inputs
    return self


def _again(value: Expression) -> Expression:
    """Return another array of the same value."""
    if isinstance(value, Stored):
        return Stored(value.name, value.operation.form)
    return Expression(value.operation, value.inputs)


_add_operators()


def constant(value: mx.array) -> Expression:
    """Return the expression of an array that is there."""
    return Expression(Operation(lambda: value, "constant", (), {}, form_of(tuple(value.shape), value.dtype)), ())


def trace(model: Any, tensors: Mapping[str, Expression]) -> dict[str, Expression]:
    """Return the parameters that the model's `sanitize` makes of stored tensors, by their names in the model.

    `model` is a model of mlx-lm that nothing has evaluated. Raises CheckpointError where `sanitize` does not accept
    the tensors.
    """
    if not hasattr(model, "sanitize"):
        return dict(tensors)
    with _recording(model):
        try:
            made = model.sanitize({name: _again(tensor) for name, tensor in tensors.items()})
        except MoectlError:
            raise
        except Exception as error:
            raise _not_accepted(model, error) from error
    return {name: value if isinstance(value, Expression) else constant(value) for name, value in made.items()}


def check_parameters(expected: Mapping[str, Shape], parameters: Mapping[str, Expression]) -> None:
    """Raise CheckpointError unless these are the model's parameters, in name and shape."""
    if missing := [name for name in expected if name not in parameters]:
        raise CheckpointError(f"the checkpoint does not give the parameter {_some(missing)}", hint=_COMPLETE)
    if unknown := [name for name in parameters if name not in expected]:
        raise CheckpointError(
            f"the checkpoint gives {_some(unknown)}, and the model has no such parameter",
            hint=ANOTHER_COPY,
        )
    for name, shape in expected.items():
        if parameters[name].shape != tuple(shape):
            given = parameters[name].shape
            raise CheckpointError(
                f"{name} has shape {given} in the checkpoint, and {tuple(shape)} by config.json", hint=CORRECT
            )


def sources(nodes: Iterable[Expression]) -> set[str]:
    """Return the names of the stored tensors that go into these results."""
    stack, seen, names = list(nodes), set[int](), set[str]()
    while stack:
        node = stack.pop()
        if isinstance(node, Stored):
            names.add(node.name)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.extend(node.inputs)
    return names


def list_dropped(tensors: Mapping[str, Expression], parameters: Mapping[str, Expression]) -> tuple[str, ...]:
    """Return the stored tensors of which no parameter is made: further heads, vision towers, old tables."""
    return tuple(sorted(sources(tensors.values()) - sources(parameters.values())))


def fill(template: Any, values: Sequence[Any]) -> Any:
    """Return arguments with a value for each hole."""
    if type(template) is Hole:
        return values[template]
    if type(template) in (tuple, list):
        return type(template)(fill(t, values) for t in template)
    return template


@contextmanager
def _recording(model: Any) -> Iterator[None]:
    """Let model files meet expressions where they expect arrays: mlx-lm's and this model's."""
    names = [n for n in sys.modules if n.startswith("mlx_lm.models.")] + [type(model).__module__]
    files = [m for n in dict.fromkeys(names) if vars(m := sys.modules[n]).get("mx") is mx]
    stand_in: Any = _Recorder(mx)
    for file in files:
        file.mx = stand_in  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for file in files:
            file.mx = mx  # type: ignore[attr-defined]


class _Recorder:
    """A module of MLX: its functions record when they are given expressions, all else is the module's own."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._module, name)
        value: Any = real
        if isinstance(real, ModuleType):
            value = _Recorder(real)
        elif callable(real) and not isinstance(real, type):
            value = partial(_call, real)
        setattr(self, name, value)
        return value


def _call(real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    traced = _has(Expression, (args, list(kwargs.values())))
    return record(real, *args, **kwargs) if traced else real(*args, **kwargs)


def _has(kind: type, values: Iterable[Any]) -> bool:
    return any(isinstance(v, kind) or (isinstance(v, list | tuple) and _has(kind, v)) for v in values)


@cache
def _load(form: Form) -> Operation:
    return Operation(lambda: None, "load", (), {}, form)


def _sign(value: Any, inputs: list[Expression]) -> Any:
    """Return what of an argument decides the form of the result; collect its expressions."""
    if isinstance(value, Expression):
        inputs.append(value)
        return value.operation.form
    if isinstance(value, list | tuple):
        return (type(value), *[_sign(v, inputs) for v in value])
    if isinstance(value, slice):
        return slice, value.start, value.stop, value.step
    if isinstance(value, mx.array):
        return mx.array
    return type(value), str(value) if isinstance(value, float) else value  # 0.0 and -0.0 are equal


def _infer(
    op: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Operation | tuple[Operation, ...]:
    """Let MLX find the form of a result: its arrays take no memory before they are evaluated."""
    shadows: list[mx.array] = []
    holes = _dig(args, shadows), {k: _dig(v, shadows) for k, v in kwargs.items()}
    name = getattr(op, "__name__", "")
    constants = _has(mx.array, (args, list(kwargs.values())))

    def make(done: mx.array, result: int | None) -> Operation:
        return Operation(op, name, *holes, form_of(tuple(done.shape), done.dtype), result, constants)

    done = make(mx.zeros(()), None).run(shadows)
    if isinstance(done, mx.array):
        return make(done, None)
    if not isinstance(done, list | tuple) or not all(isinstance(d, mx.array) for d in done):
        raise _NeedsValues
    return tuple(make(one, i) for i, one in enumerate(done))


def _dig(value: Any, shadows: list[mx.array]) -> Any:
    """Return an argument with holes instead of expressions; collect arrays of their forms."""
    if isinstance(value, Expression):
        shadows.append(mx.zeros(value.shape, value.dtype))
        return Hole(len(shadows) - 1)
    if type(value) in (tuple, list):
        return type(value)(_dig(v, shadows) for v in value)
    return mx.array(value) if isinstance(value, mx.array) else value  # the model's own may change in place


def _changes_nothing(operation: Operation, inputs: Sequence[Expression]) -> bool:
    return operation.name == "contiguous" or (operation.name == "astype" and inputs[0].operation.form is operation.form)


def _not_accepted(model: Any, error: Exception) -> CheckpointError:
    kind = getattr(model, "model_type", None) or type(model).__module__.rpartition(".")[2]
    if isinstance(error, KeyError):
        return CheckpointError(f"the checkpoint has no tensor {error.args[0]}", hint=_COMPLETE)
    if isinstance(error, _NeedsValues):
        why = "it looks at the values of weights while it loads them, and moectl reads no weights at that point"
    else:
        why = f"{type(error).__name__}: {error}"
    return CheckpointError(f"mlx-lm's loading of {kind} does not accept this checkpoint: {why}", hint=CORRECT)


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
