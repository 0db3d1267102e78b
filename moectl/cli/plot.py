"""A picture of benchmarks as SVG, drawn from the documents of `bench --json`. It measures nothing.

matplotlib is an optional extra and loaded only here, without its windows (no pyplot, no display).
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

from moectl.errors import UsageError
from moectl.files import check_destination, write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SCHEMA = "moectl.bench/1"
_SPEEDS = (("prefill_tok_s", "prompt"), ("decode_tok_s", "generate"))
_PARTS = (("compute_s", "compute"), ("all_reduce_s", "all-reduce"), ("other_s", "other"))


def check_plot(path: Path) -> None:
    """Raise UsageError when a plot could not be written there, before anything is measured for it."""
    if path.suffix.lower() != ".svg":
        raise UsageError(f"--plot writes SVG: {path} should end in .svg")
    check_destination(path)
    _new_figure(1, 1)


def read_documents(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return earlier results that `bench --json` printed. Raises UsageError."""
    documents = []
    for path in paths:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["schema"] != SCHEMA:
                raise ValueError("another schema")
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"{path} is no result of moectl bench: {error}", hint="moectl bench --json > FILE"
            ) from None
        documents.append(document)
    return documents


def write_plot(path: Path, documents: Sequence[dict[str, Any]]) -> None:
    """Draw one benchmark over its trials, or several over their numbers of ranks, with predictions beside them.

    Left and middle: tokens per second of prompt and generation; right: the parts of a token's time, per rank of the one
    benchmark or of the slowest rank of each. Raises UsageError without matplotlib, StateError when the disk refuses.
    """
    _new_figure(1, 1)  # says what is missing
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moectl"}):  # text stays text
        write_whole(path, _draw(documents))


def _draw(documents: Sequence[dict[str, Any]]) -> bytes:
    figure = _new_figure(12, 3.6)
    axes = figure.subplots(1, 3)
    for axis, (key, title) in zip(axes, _SPEEDS, strict=False):
        (_draw_ranks if len(documents) > 1 else _draw_trials)(axis, documents, key)
        axis.set(title=title, ylabel="tokens/s")
        _finish(axis)
    _draw_parts(axes[2], documents)
    figure.suptitle(" · ".join(dict.fromkeys(f"{d['model']}" for d in documents)))
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()


def _draw_trials(axis: Any, documents: Sequence[dict[str, Any]], key: str) -> None:
    [document] = documents
    numbers = range(1, len(document["trials"]) + 1)
    axis.plot(numbers, [trial[key] for trial in document["trials"]], "o-", label="measured")
    if document["predicted"]:
        axis.axhline(document["predicted"][key], linestyle="--", color="C1", label="predicted")
    axis.set_xlabel("trial")
    axis.set_xticks(numbers)


def _draw_ranks(axis: Any, documents: Sequence[dict[str, Any]], key: str) -> None:
    ordered = sorted(documents, key=lambda d: len(d["ranks"]))
    sizes = [len(d["ranks"]) for d in ordered]
    means = [d[key]["mean"] for d in ordered]
    axis.errorbar(sizes, means, [d[key]["sd"] or 0.0 for d in ordered], fmt="o-", capsize=3, label="measured")
    expected = [(len(d["ranks"]), d["predicted"][key]) for d in ordered if d["predicted"]]
    if expected:
        axis.plot(*zip(*expected, strict=True), "x--", label="predicted")
    axis.set_xlabel("ranks")
    axis.set_xticks(sorted(set(sizes)))


def _draw_parts(axis: Any, documents: Sequence[dict[str, Any]]) -> None:
    if len(documents) == 1:
        bars = [(f"{rank['rank']} {rank['host']}", rank) for rank in documents[0]["ranks"]]
    else:
        ordered = sorted(documents, key=lambda d: len(d["ranks"]))
        bars = [(f"{len(d['ranks'])} ranks", max(d["ranks"], key=lambda r: r["compute_s"])) for d in ordered]
    places = range(len(bars))
    below = [0.0] * len(bars)
    for part, label in _PARTS:
        heights = [max(0.0, bar[part]) * 1e3 for _, bar in bars]
        axis.bar(places, heights, bottom=below, label=label)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axis.set_xticks(places, [name for name, _ in bars])
    axis.set(title="per token", ylabel="ms")
    _finish(axis)


def _finish(axis: Any) -> None:
    axis.margins(x=0.1)
    axis.set_ylim(0, 1.25 * axis.get_ylim()[1])  # room for the legend
    axis.legend(loc="upper center", ncols=3, frameon=False)


def _new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "--plot needs matplotlib, which is not installed here", hint="pip install 'moectl[plot]'"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")
