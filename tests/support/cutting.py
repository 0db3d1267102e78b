"""Cut a checkpoint in this process, and compare a shard set with a model's whole parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from moectl.model.catalog import CatalogModel
from moectl.model.manifest import Manifest
from moectl.model.regions import Region
from moectl.shards import build, quantize
from moectl.shards.prepare import Wanted, draw_wanted, place
from moectl.shards.recipe import Computed, Matrix, Read as ReadRows, Write
from moectl.shards.source.checkpoint import open_checkpoint
from moectl.shards.trace.parts import Read


def cut(
    source: Path,
    directory: Path,
    *,
    name: str = "set",
    jobs: int = 2,
    force: bool = False,
    compute_canary: build.ComputeCanary | None = None,
    **wanted: Any,
) -> Manifest:
    """Cut a checkpoint as `wanted`, the fields of `Wanted`, says; return the manifest."""
    asked = Wanted(**wanted)
    with open_checkpoint(str(source)) as checkpoint:
        blueprint = draw_wanted(checkpoint, asked)
        placement = place(CatalogModel(checkpoint.source, blueprint.structure, blueprint.quantization), asked)
        return build.cut(
            checkpoint,
            blueprint,
            placement,
            directory,
            name=name,
            jobs=jobs,
            force=force,
            compute_canary=compute_canary,
        )


def compare(directory: Path, manifest: Manifest, whole: dict[str, mx.array]) -> None:
    """See that each file holds the regions that the manifest says, bit for bit, and that together they are all."""
    files: dict[str, Any] = {
        name: mx.load(str(directory / name)) for name in manifest.files if name.endswith(".safetensors")
    }
    found = {(name, file) for file, arrays in files.items() for name in arrays}
    assert found == {(name, file) for name, places in manifest.tensors.items() for file in places}
    for name, places in manifest.tensors.items():
        covered = mx.zeros(whole[name].shape, dtype=mx.bool_)
        for file, regions in places.items():
            array: mx.array = files[file][name]
            assert_same(array, join(whole[name], regions), f"{name} in {file}")
            for region in regions or (tuple((0, n) for n in array.shape),):
                covered[tuple(slice(*span) for span in region)] = True
        assert covered.all(), f"{name} is not whole"
    assert set(whole) == set(manifest.tensors)


def assert_same(array: mx.array, wanted: mx.array, what: str) -> None:
    """Assert that two arrays are the same bits, of the same type and shape."""
    assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape), what
    assert mx.array_equal(array.reshape(-1).view(mx.uint8), wanted.reshape(-1).view(mx.uint8)), what


def join(array: mx.array, regions: tuple[Region, ...]) -> mx.array:
    """Return regions of an array, side by side; no regions: all of it."""
    if not regions:
        return array
    axis = next((i for i in range(array.ndim) if any(region[i] != (0, array.shape[i]) for region in regions)), 0)
    return mx.concatenate([array[tuple(slice(*span) for span in region)] for region in regions], axis=axis)


@contextmanager
def converting(
    before: Callable[[], object] = lambda: None, after: Callable[[int], object] = lambda _: None
) -> Iterator[None]:
    """Call `before` each piece that is not merely copied, and `after` it with the bytes that it has become."""

    class Watched(quantize.Converter):
        def convert(self, matrix: Matrix, read: ReadRows, write: Write) -> None:
            with watch(write) as watched:
                super().convert(matrix, read, watched)

        def compute(self, work: Computed, read: Read, write: Write) -> None:
            with watch(write) as watched:
                super().compute(work, read, watched)

    @contextmanager
    def watch(write: Write) -> Iterator[Write]:
        made = 0

        def count(part: int, offset: int, data: memoryview) -> None:
            nonlocal made
            write(part, offset, data)
            made += len(data)

        before()
        yield count
        after(made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "Converter", Watched)
        yield
