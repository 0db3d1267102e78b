"""`moectl shard` and `moectl pull`: from a checkpoint to a shard set on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moectl import errors
from moectl.cli import suggest
from moectl.cli.options import DEFAULT_MODEL, WANTED, Common, common, cut_options, refuse_both
from moectl.cli.target import read_wanted, shard_model
from moectl.cli.verb import flag, verb
from moectl.text import size_text

if TYPE_CHECKING:
    from moectl.shards.prepare import Made


@verb("Prepare", old={"-n": "--nodes"})
@click.argument("model", default=DEFAULT_MODEL, shell_complete=suggest.models)
@click.option("--nodes", type=click.IntRange(1), help="Number of ranks (default: one for each host).")
@cut_options
@flag(
    "-j", "--jobs", rare=True, type=click.IntRange(1), help="Parallel streams (default: all cores but one, at most 4)."
)
@click.option("--dry-run", is_flag=True, help="Show what would be made.")
@flag(
    "--force",
    rare=True,
    is_flag=True,
    help="Make the set again from the beginning, also over another one, and although a host has too little memory.",
)
@click.option(
    "--verify",
    type=click.Path(path_type=Path),
    metavar="DIR",
    shell_complete=suggest.directories,
    help="Cut nothing; check the hash of every file of this shard set.",
)
@flag(
    "--add-tokenizer",
    rare=True,
    metavar="REPO|DIR",
    help="Cut nothing; give the shard set of --output (default: the newest) this tokenizer.",
)
@common
def shard(
    common: Common, model: str, verify: Path | None, add_tokenizer: str | None, dry_run: bool, **options: Any
) -> None:
    """Cut a checkpoint into one shard per node.

    MODEL is a directory or a Hugging Face repository (default: databricks/dbrx-instruct, or a mirror of it when that is
    out of reach). After an interruption, the same command again resumes it.

    \b
    Examples:
      moectl shard databricks/dbrx-instruct --nodes 4 --q-bits 4
      moectl shard ./my-dbrx --nodes 3 --split experts --shares 8,4,4
      moectl shard --add-tokenizer Xenova/dbrx-instruct-tokenizer
      moectl shard --verify ~/.local/share/moectl/shards/dbrx-instruct-q4-hidden-4
    """
    refuse_both({"--verify": verify}, {"--add-tokenizer": add_tokenizer, "--tokenizer": options["tokenizer"]})
    refuse_both({"--add-tokenizer": add_tokenizer}, {"--tokenizer": options["tokenizer"], "--dry-run": dry_run})
    if verify:
        _verify(common, verify)
        return
    if add_tokenizer:
        _add_tokenizer(common, add_tokenizer, options["output"])
        return
    from moectl.planner.questions import PlanOptions, choose_bits_on, place_on, refuse_early

    nodes = options.pop("nodes")
    hosts = common.host_list()
    if nodes is None and options["shares"] is None:
        if hosts is None:
            raise errors.UsageError("how many nodes? There is no hosts file", hint="use --nodes N or --hostfile FILE")
        nodes = len(hosts.hosts)
    wanted = read_wanted(options, nodes)
    for name in WANTED:
        del options[name]
    if hosts is not None:
        if nodes in (None, len(hosts.hosts)) and not options["force"]:
            refuse_early(model, wanted, hosts.hosts)
        if not options["force"]:
            options["choose_bits"] = choose_bits_on(hosts.hosts, PlanOptions(), say=common.say)
        options["choose_place"] = place_on(hosts.hosts, PlanOptions(), force=options["force"], say=common.say)
    options["directory"] = options.pop("output")
    made = shard_model(common, model, wanted, dry_run=dry_run, **options)
    common.print(shard_text(made, dry_run=dry_run), shard_json(made, dry_run=dry_run), str(made.directory))


def _add_tokenizer(common: Common, source: str, where: Path | None) -> None:
    from moectl.shards import prepare
    from moectl.shards.source.hub_environment import check_numbers

    check_numbers()  # what follows imports mlx-lm, and with it huggingface_hub
    from moectl.shards import tokenizer_files

    if where is None:
        hosts = common.host_list()
        directory, _ = prepare.newest_shards(None if hosts is None else len(hosts.hosts))
    else:
        directory, _ = prepare.find_shards(where)
    manifest = tokenizer_files.add_tokenizer(directory, source)
    document = {"schema": "moectl.tokenizer/1", "directory": str(directory), "name": manifest.name, "source": source}
    text = f"{manifest.name} in {directory} has the tokenizer of {source} now. To bring it to the hosts: moectl deploy"
    common.print(text, document, str(directory))


def _verify(common: Common, directory: Path) -> None:
    from moectl.cli.progress import progress
    from moectl.model.manifest import read_manifest
    from moectl.shards import build

    total = sum(f.bytes for f in read_manifest(directory).files.values())
    with progress(quiet=common.quiet) as bars:
        manifest = build.verify(directory, on_bytes=bars(directory.name, total))
    count = len(manifest.files)
    document = {"schema": "moectl.verify/1", "files": count, "bytes": total}
    common.print(f"{count} files, {size_text(total)}: every hash is right.", document)


@verb("Prepare")
@click.argument("model", default=DEFAULT_MODEL, shell_complete=suggest.models)
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@common
def pull(common: Common, model: str, revision: str | None) -> None:
    """Download a checkpoint into the Hugging Face cache, without cutting it.

    'moectl shard' also downloads, file by file, and deletes what it has cut; this verb keeps everything.

    \b
    Example:
      moectl pull mlx-community/dbrx-instruct-4bit
    """
    from moectl.cli.progress import progress
    from moectl.shards.prepare import download_bars
    from moectl.shards.source import checkpoint

    with progress(quiet=common.quiet) as bars:
        directory = checkpoint.pull(model, revision=revision, on_bytes=download_bars(bars))
    common.print(str(directory), {"schema": "moectl.pull/1", "directory": str(directory)}, str(directory))


def shard_text(made: Made, *, dry_run: bool) -> str:
    """Return one line about a shard set."""
    if dry_run:
        return f"Dry run: nothing was written. {size_text(made.bytes)} would be, in {made.directory}."
    count = made.placement.world_size
    return f"{size_text(made.bytes)} in {made.directory}, one shard for each of {count} ranks, {made.bits} bits."


def shard_json(made: Made, *, dry_run: bool) -> dict[str, Any]:
    """Return the document of `shard --json`."""
    return {
        "schema": "moectl.shard/1",
        "directory": str(made.directory),
        "split": made.placement.split,
        "shares": list(made.placement.shares),
        "replicas": made.placement.replicas,
        "q_bits": made.bits,
        "bytes": made.bytes,
        "dry_run": dry_run,
    }
