"""What flags ask for: which model to run and where, how to cut it, which hosts to look at."""

from __future__ import annotations

import contextlib
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moectl import errors
from moectl.cli.options import Common, refuse_both
from moectl.demo import demo_dir

if TYPE_CHECKING:
    from moectl.engine.protocol import RunOptions
    from moectl.hosts.hostfile import Host
    from moectl.model.canary import Canary
    from moectl.model.manifest import Manifest
    from moectl.session.deployment import DeployedRank, Deployment
    from moectl.session.target import Target
    from moectl.shards.prepare import Bars, Made, Wanted

DEMO_SAYS = "the demo answers, a toy. Name a model with -m MODEL; --demo asks for the toy"
PARANOIA = (
    32  # steps from one comparison to the next: often enough to stop nonsense soon, and seldom enough to cost nothing
)


# What other tools call a model, with a size, a version or a tag: llama3, qwen2.5-coder:7b, gpt-oss:20b.
_ELSEWHERE = re.compile(
    r"(llama|codellama|qwen|mistral|mixtral|gemma|phi|gpt|deepseek|dbrx|glm|kimi|granite|olmo|minimax|falcon|smollm)"
    r"[\w.-]*[\d:][\w.:-]*",
    re.IGNORECASE,
)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]*[\d-][\w.-]*", re.ASCII)


def take_model(common: Common, words: tuple[str, ...], options: dict[str, Any]) -> tuple[str, ...]:
    """Return the words of a prompt without the model with which they begin; that one goes into the options.

    Raises UsageError where the first word is a model's name in other tools, and names nothing here.
    """
    from moectl.model.catalog import MODELS
    from moectl.session.deployment import find_deployment
    from moectl.shards.prepare import names_shards

    first = words[0] if words else ""
    if not first or first.split() != [first] or any(options[name] for name in ("model", "shards", "demo")):
        return words
    deployment = find_deployment()
    here = Path(first).expanduser()
    if deployment is not None and first in (deployment.name, _source_of(deployment)):
        return words[1:]
    if names_shards(first):
        options["shards"] = first
    elif (here / "config.json").is_file() or first in MODELS or (len(words) > 1 and _REPOSITORY.fullmatch(first)):
        options["model"] = first
    elif _ELSEWHERE.fullmatch(first):
        raise errors.UsageError(
            f"{first!r} looks like a model, and there is no shard set of this name here", hint="moectl list"
        )
    else:
        return words
    common.say(f"The model is {first}.")
    return words[1:]


def _source_of(deployment: Deployment) -> str | None:
    """Return the name that a deployment's model has in the API, where its copy on this machine is still there."""
    from moectl.model.manifest import read_manifest

    with contextlib.suppress(errors.NotSharded, errors.IntegrityError):
        return read_manifest(Path(deployment.shards)).source
    return None


def run_options(flags: dict[str, Any]) -> RunOptions:
    """Return how to run a model, as the flags of `target_options` say."""
    from moectl.engine.protocol import RunOptions

    named = {field.name: flags[field.name] for field in fields(RunOptions) if field.name in flags}
    named |= {
        "start_timeout_s": flags["start_timeout"],
        "canary": not flags["no_canary"],
        "paranoia": PARANOIA if flags["paranoia"] else 0,
    }
    return RunOptions(**named)


def choose_target(common: Common, options: dict[str, Any]) -> Target:
    """Return what to run: a shard set on this machine, or a deployment on hosts."""
    from moectl.model.manifest import read_manifest
    from moectl.planner.questions import check_here, check_hosts, choose_bits_here, place_here
    from moectl.session import target as target_
    from moectl.shards.prepare import Wanted, find_shards, names_shards

    local, shards, model, demo = options["local"], options["shards"], options["model"], options["demo"]
    if model and not shards and names_shards(model):  # `-m NAME`, where other tools know no shards
        shards, model = model, None
    here = {"--local": local, "--shards": shards, "--model": model}
    cutting = {f"--{name.replace('_', '-')}": options[name] for name in ("split", "shares", "replicas", "q_bits")}
    force = options["force"]
    refuse_both({"--demo": demo}, {"--shards": shards, "--model": model, "--hosts": common.hosts})
    refuse_both({"--shards": shards}, {"--model": model, **cutting})
    refuse_both({"--hosts": common.hosts, "--hostfile": common.hostfile}, here)
    if shards:
        directory, manifest = find_shards(shards)
        if local not in (None, manifest.world_size):
            raise errors.UsageError(
                f"{directory.name} is cut for {manifest.world_size} ranks, not {local}",
                hint=f"use --local {manifest.world_size}",
            )
        check_here(manifest, force=force, say=common.say)
        return target_.Local(directory, manifest)
    if not (local or model or demo):
        deployment = target_.find_deployment(common.host_list())
        if deployment is not None:
            refuse_both({f"the deployment {deployment.name}": True}, cutting)
            hosts = [rank.host for rank in deployment.ranks]
            with contextlib.suppress(errors.NotSharded, errors.IntegrityError):  # the copy on this machine may be gone
                check_hosts(hosts, read_manifest(Path(deployment.shards)), force=force, warn=common.say)
            return deployment
    if not (model or demo):
        # Also under --quiet: a toy's answer must not be taken for a real model's.
        click.echo(f"Warning: no model is named{'' if local else ', and none is deployed'}: {DEMO_SAYS}", err=True)
    shares = read_shares(options["shares"])
    nodes = local or (None if shares else 2)
    wanted = Wanted(options["split"] or "auto", nodes, shares, options["replicas"] or 1, bits=options["q_bits"])
    made = shard_model(
        common,
        model or str(demo_dir()),
        wanted,
        cached=True,
        choose_bits=None if force else choose_bits_here(common.say),
        choose_place=place_here(force, common.say),
        no_canary=options["no_canary"],
    )
    return target_.Local(made.directory, read_manifest(made.directory))


def find_others(common: Common, target: Target) -> list[Target]:
    """Return the other deployments on a deployment's hosts, newest first; say which of them is not whole."""
    from moectl.session.deployment import Deployment, find_beside

    if not isinstance(target, Deployment):
        return []
    found: list[Target] = []
    for other in find_beside(target):
        if other.missing:
            common.say(f"{other.name} is not offered: it is not deployed on {', '.join(other.missing)} yet.")
        else:
            found.append(replace(target, name=other.name, shards=other.shards, ranks=_move(target, other)))
    return found


def _move(target: Deployment, other: Deployment) -> tuple[DeployedRank, ...]:
    """Return another deployment's ranks, with the hosts as they are now."""
    return tuple(replace(theirs, host=ours.host) for ours, theirs in zip(target.ranks, other.ranks, strict=True))


def shard_model(
    common: Common,
    model: str,
    wanted: Wanted,
    *,
    no_canary: bool = False,
    tokenizer: str | None = None,
    among: Bars | None = None,
    **options: Any,
) -> Made:
    """Cut a model with progress on the terminal, `among` other bars; `options` are `prepare.shard`'s."""
    from moectl.cli.progress import progress
    from moectl.model.canary import NoReference, describe_unmet
    from moectl.shards import prepare
    from moectl.shards.source.hub_environment import check_numbers

    check_numbers()  # what follows imports mlx-lm, and with it huggingface_hub
    from moectl.shards.tokenizer_files import choose_tokenizer

    canaries: list[Canary] = []
    warnings: list[str] = []
    with contextlib.nullcontext(among) if among else progress(quiet=common.quiet) as bars:

        def compute_canary(directory: Path, manifest: Manifest) -> Canary | None:
            try:
                canaries.append(_compute_canary(directory, manifest, bars))
            except NoReference as error:
                warnings.append(f"{manifest.name} has no canary, so its starts are not checked: {error}")
                return None
            return canaries[-1]

        made = prepare.shard(
            model,
            wanted,
            choose_tokenizer=choose_tokenizer(model, tokenizer, _can_read, common.say),
            compute_canary=None if no_canary else compute_canary,
            say=common.say,
            bars=bars,
            **options,
        )
    for warning in [*warnings, *filter(None, map(describe_unmet, canaries))]:
        common.say(f"Warning: {warning}")
    return made


def _can_read(directory: Path) -> None:
    """Raise CheckpointError unless a worker can read this tokenizer."""
    from moectl.shards.chat.tokenizer import open_tokenizer

    open_tokenizer(directory)


def _compute_canary(directory: Path, manifest: Manifest, bars: Bars) -> Canary:
    """Run a finished set once, with a bar over its layers."""
    from moectl.engine.network.canary_run import compute_canary

    weights = sum(entry.bytes for entry in manifest.files.values())
    advance = bars("canary", weights)
    return compute_canary(
        directory, manifest, on_layer=lambda done, of: advance(weights * done // of - weights * (done - 1) // of)
    )


def read_shares(text: str | None) -> tuple[int | float, ...] | None:
    """Return --shares as numbers. Raises UsageError."""
    if text is None:
        return None
    try:
        return tuple(int(part) if part.strip().isdigit() else float(part) for part in text.split(","))
    except ValueError:
        raise errors.UsageError(f"--shares should be numbers like 2,1,1, it is {text!r}") from None


def advise(target: Target, failure: errors.MoectlError) -> str | None:
    """Return how the other hosts could continue, when a host stays away."""
    from moectl.session.deployment import Deployment

    # The error of a worker that ended or is silent is a plain RemoteError; others come from a host that answers.
    is_away = isinstance(failure, errors.Unreachable) or type(failure) is errors.RemoteError
    if not (isinstance(target, Deployment) and failure.host and is_away):
        return None
    from moectl.cluster.deploy.remedy import find_remedy

    return find_remedy(target, failure.host)


def find_deployment_or_hosts(common: Common) -> tuple[Deployment | None, tuple[Host, ...]]:
    """Return the deployment; or the hosts that the flags name, where they are not those of the deployment."""
    from moectl.session.deployment import find_deployment

    deployment = find_deployment()
    named = common.hosts is not None or common.hostfile is not None
    listed = common.host_list() if named or deployment is None else None
    if listed is None:
        return deployment, ()
    if deployment is not None and deployment.addresses == tuple(h.address for h in listed.hosts):
        return deployment, ()
    return None, listed.hosts


def read_wanted(options: dict[str, Any], nodes: int | None = None) -> Wanted:
    """Return what `wanted_options` ask for. Raises UsageError."""
    from moectl.model.routing import read_routing
    from moectl.shards.prepare import Wanted

    stats = options["routing_stats"]
    return Wanted(
        split=options["split"],
        nodes=nodes,
        shares=read_shares(options["shares"]),
        replicas=options["replicas"],
        routing=read_routing(stats) if stats else None,
        bits=options["q_bits"],
        group_size=options["q_group_size"],
        mode=options["q_mode"],
        recipe=options["q_recipe"],
    )
