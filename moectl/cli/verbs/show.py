"""`moectl show`: what a shard set or a model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moectl.cli import suggest
from moectl.cli.options import Common, common
from moectl.cli.verb import verb
from moectl.text import parameters_text, size_text

if TYPE_CHECKING:
    from moectl.model.catalog import CatalogModel
    from moectl.model.manifest import Manifest

_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_LONGEST = 80  # letters of a licence's first line
_COLUMN = 13


def describe(model: CatalogModel, manifest: Manifest | None, directory: Path | None) -> dict[str, Any]:
    """Return the document of `show --json`: what is known of a model, and of its shard set where it is one.

    Sizes are in bytes; None is what is not known here. Raises CheckpointError for damaged files.
    """
    from moectl.shards.source.checkpoint import read_sampling

    structure, quantization = model.structure, model.quantization
    return {
        "schema": "moectl.show/1",
        "name": model.name,
        "family": structure.model_type,
        "parameters": structure.parameters,
        "active_parameters": structure.active_parameters,
        "layers": structure.n_layers,
        "experts": structure.n_experts,
        "experts_used": structure.top_k,
        "context": structure.context,
        "quantization": None
        if quantization is None
        else {"bits": quantization.bits, "group_size": quantization.group_size, "mode": quantization.mode},
        "template": None if directory is None else _has_template(directory),
        "sampling": None if directory is None else read_sampling(directory),
        "licence": None if directory is None else _read_licence(directory),
        "set": None if manifest is None else _describe_set(manifest, directory),
    }


def _describe_set(manifest: Manifest, directory: Path | None) -> dict[str, Any]:
    return {
        "directory": str(directory),
        "source": manifest.source,
        "revision": manifest.revision,
        "split": manifest.split,
        "shares": list(manifest.shares),
        "rank_bytes": [
            sum(file.bytes for file in manifest.files_of(rank).values()) for rank in range(manifest.world_size)
        ],
        "canary": manifest.canary is not None,
    }


def _has_template(directory: Path) -> bool:
    if any((directory / name).is_file() for name in _TEMPLATES):
        return True
    path = directory / "tokenizer_config.json"
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def _read_licence(directory: Path) -> str | None:
    """Return the first line of the licence that came with the model."""
    for path in sorted(directory.glob("LICENSE*")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        first = next((" ".join(line.split()) for line in lines if line.strip()), None)
        if first:
            return first[:_LONGEST]
    return None


def show_text(found: dict[str, Any]) -> str:
    """Return what `describe` found, by sections."""
    quantization, sampling, of = found["quantization"], found["sampling"], found["set"]
    experts = f"{found['experts']}, {found['experts_used']} used per token" if found["experts"] else "none"
    precision = "16 bits"
    if quantization:
        precision = f"{quantization['bits']} bits, {quantization['mode']}, groups of {quantization['group_size']}"
    active = parameters_text(found["active_parameters"])
    sections = {
        "Model": {
            "name": found["name"],
            "family": found["family"],
            "parameters": f"{parameters_text(found['parameters'])}, {active} active",
            "layers": str(found["layers"]),
            "experts": experts,
            "context": f"{found['context']} tokens",
            "precision": precision,
            "licence": found["licence"] or "not known",
        }
    }
    if of is not None:
        ranks = ", ".join(map(size_text, of["rank_bytes"]))
        sections["Shard set"] = {
            "directory": of["directory"],
            "source": of["source"] + (f" at {of['revision']}" if of["revision"] else ""),
            "split": f"{of['split']}, shares {':'.join(f'{share:g}' for share in of['shares'])}",
            "ranks": f"{len(of['rank_bytes'])}: {ranks}",
            "canary": "yes" if of["canary"] else "none: starts are not checked",
        }
    if sampling is not None:
        sections["Chat"] = {
            "template": "yes" if found["template"] else "none: only raw prompts",
            "sampling": ", ".join(f"{name} {value:g}" for name, value in sampling.items())
            or "greedy: the model brings no defaults",
        }
    lines = []
    for section, rows in sections.items():
        lines += [section, *(f"  {name:<{_COLUMN}}{value}" for name, value in rows.items())]
    return "\n".join(lines)


@verb("Observe")
@click.argument("name", shell_complete=suggest.shard_sets)
@common
def show(common: Common, name: str) -> None:
    """Show what a shard set or a model is.

    NAME is what 'moectl list' shows, a directory, or a Hugging Face repository, of which only the headers are read. It
    tells parameters, context, precision, split, ranks, chat template, sampling and licence, as far as they are known.

    \b
    Examples:
      moectl show dbrx-instruct-q4-hidden-4
      moectl show databricks/dbrx-instruct
      moectl show ./my-dbrx --json | jq .sampling
    """
    from moectl.session.deployment import find_deployment
    from moectl.shards.prepare import describe_model, find_shards

    deployment = find_deployment()
    if deployment is not None and deployment.name == name:
        name = deployment.shards
    model, manifest = describe_model(name)
    directory = find_shards(name)[0] if manifest is not None else Path(name).expanduser()
    found = describe(model, manifest, directory if directory.is_dir() else None)
    common.print(show_text(found), found)
