"""The structure of a model in numbers: what its layers consist of, and how each part may be divided among ranks.

`shards.outline` finds it in a model's skeleton, and a shard set's manifest keeps it: with it, what a rank holds, needs
and computes is arithmetic, without MLX and without a file of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from moectl.model.regions import Pieces, Role


@dataclass(frozen=True, slots=True)
class Quantization:
    """How weights are quantised, in MLX's terms."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.mode}, groups of {self.group_size}"


@dataclass(frozen=True, slots=True)
class Part:
    """Arrays of a model that are divided alike, or not at all; counts are elements, of all experts of a stack."""

    values: int = 0  # of matrices, which are quantised or can be
    floats: int = 0  # of all that stays as it is: norms, biases, routers
    quantization: Quantization | None = None  # of the values
    hidden: Pieces | None = None  # the hidden dimension of a unit, where it is divided along that
    heads: Pieces | None = None  # the heads of an attention
    experts: int = 0  # that are stacked; 0: it is no stack
    top_k: int = 0  # experts of the stack that a token goes to
    is_shared_out: bool = False  # whether a rank can hold whole experts of the stack

    def pieces(self, split: str) -> Pieces | None:
        """Return what a split shares out among ranks; None: each rank has all of the part."""
        if split == "experts" and self.is_shared_out:
            return Pieces(Role.EXPERT, self.experts)
        if split in ("experts", "hidden", "tensor") and self.hidden is not None:
            return self.hidden
        return self.heads if split == "tensor" else None

    @property
    def active(self) -> float:
        """The part of its values that one token meets."""
        return self.top_k / self.experts if self.experts else 1.0

    def count_bytes(self, dtype_bytes: int) -> int:
        """Return its bytes in memory, where floats have `dtype_bytes` bytes."""
        q = self.quantization
        if q is None:
            return (self.values + self.floats) * dtype_bytes
        scale = 2 * dtype_bytes if q.mode == "affine" else 1
        return self.values * q.bits // 8 + self.values // q.group_size * scale + self.floats * dtype_bytes


@dataclass(frozen=True, slots=True)
class CacheSize:
    """What a layer keeps of the tokens before: elements per token, and elements whatever the length."""

    per_token: int = 0
    fixed: int = 0
    limit: int | None = None  # tokens that are kept; None: all
    heads: Pieces | None = None  # KV heads, where ranks that divide attention divide it too
    floats: int = 0  # elements whatever the length that are float32, whatever the model's type is


@dataclass(frozen=True, slots=True)
class Moment:
    """Elements of the intermediate arrays that are there at once while a prompt passes.

    Per token, and per pair of a token with one of the context: of arrays that every rank has whole, and of those that
    are divided as the units' hidden dimension or as the attention's heads.
    """

    whole: int = 0
    hidden: int = 0
    heads: int = 0
    pairs: int = 0
    head_pairs: int = 0


@dataclass(frozen=True, slots=True)
class Layer:
    """One kind of layer."""

    parts: tuple[Part, ...]
    caches: tuple[CacheSize, ...] = ()
    sums: int = 1  # over ranks in one pass, where its units are divided,
    head_sums: int = 0  # and more where its heads are
    launches: int = 0  # operations on a GPU when one token passes; 0: not known


@dataclass(frozen=True, slots=True)
class Outer:
    """Arrays that are in no layer. A rank has them where it has the end that is named; where none is, it has them."""

    part: Part
    first: bool = False  # what comes before the layers needs them
    last: bool = False  # what comes after them needs them: the head


@dataclass(frozen=True, slots=True)
class Structure:
    """A whole model."""

    model_type: str  # as config.json has it
    kinds: tuple[Layer, ...]
    order: tuple[int, ...]  # the kind of each layer
    outer: tuple[Outer, ...]
    width: int  # elements of one token's state between layers
    vocab_size: int
    context: int  # tokens, at most
    cpu_moments: tuple[Moment, ...] = ()  # when most is there on a CPU: one of them, depending on what is divided
    gpu_moments: tuple[Moment, ...] = ()  # and on a GPU
    refused: Mapping[str, str] = field(default_factory=dict)  # split → why the model cannot be divided so
    has_line: bool = True  # whether layers follow one another, so that a rank can leave out what comes after them
    can_trim: bool = True  # whether all its caches can forget their last tokens
    can_batch: bool = True  # whether its caches take several rows

    @property
    def n_layers(self) -> int:
        return len(self.order)

    @property
    def layers(self) -> Iterator[Layer]:
        return (self.kinds[kind] for kind in self.order)

    @property
    def parts(self) -> Iterator[Part]:
        """All parts, each as often as the model has it."""
        yield from (outer.part for outer in self.outer)
        yield from (part for layer in self.layers for part in layer.parts)

    @property
    def stacks(self) -> Iterator[Part]:
        """The stacks of experts of which a rank can hold some, by layer."""
        return (part for layer in self.layers for part in layer.parts if part.is_shared_out)

    @property
    def n_experts(self) -> int:
        """Experts of a layer; 0: the model has none that can be shared out."""
        return max((stack.experts for stack in self.stacks), default=0)

    @property
    def top_k(self) -> int:
        """Experts of a layer that work on one token."""
        return max((stack.top_k for stack in self.stacks), default=0)

    @property
    def parameters(self) -> int:
        return sum(part.values + part.floats for part in self.parts)

    @property
    def active_parameters(self) -> int:
        """The parameters that take part in one token."""
        return round(sum(part.values * part.active + part.floats for part in self.parts))

    def quantised(self, quantization: Quantization | None, *, over: Quantization | None = None) -> Structure:
        """Return the structure with all matrices quantised so, or in 16 bits: an estimate for a plan.

        `over` is the precision of most matrices; those with another one are packed already, and stay. Which matrices
        mlx-lm would leave out is not looked up: those whose rows are no whole groups.
        """

        def change(part: Part) -> Part:
            if part.quantization not in (None, over):
                return part
            grain = 1 if quantization is None else quantization.group_size
            hidden = None if part.hidden is None else replace(part.hidden, grain=grain)
            return replace(part, quantization=quantization if part.values else None, hidden=hidden)

        kinds = tuple(replace(kind, parts=tuple(map(change, kind.parts))) for kind in self.kinds)
        return replace(self, kinds=kinds, outer=tuple(replace(o, part=change(o.part)) for o in self.outer))
