"""The names of a server's models: a stable one for each, aliases, and which model a request's name means.

It knows targets and their manifests. Nothing here loads a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from moectl.demo import demo_dir
from moectl.engine.protocol import Ready
from moectl.errors import CheckpointError, IntegrityError, NotSharded, UsageError
from moectl.model.manifest import Manifest, read_manifest
from moectl.model.structure import Quantization
from moectl.server.openai import no_such_model
from moectl.session.target import Target
from moectl.shards.source.checkpoint import read_sampling

DEFAULT = "default"  # the model that is loaded, else the first one
ALIAS_FLAG, ANY_FLAG, PIN_FLAG = "--alias", "--any-model", "--pin"


@dataclass(frozen=True, slots=True)
class Offered:
    """One model of a server."""

    name: str  # stable: cutting the model again does not change it
    names: frozenset[str]  # by which clients may know it besides, in lower case
    target: Target
    model: Ready  # as far as its shard set says
    quantization: str
    bytes: int  # of all ranks' weights
    demo: bool


class Menu:
    """All models of a server, and the names under which clients ask for them."""

    def __init__(self, offers: Sequence[Offered], *, aliases: Sequence[str] = (), any_model: bool = False) -> None:
        """Take models, the one for requests without a name first; an alias is NAME=MODEL, or NAME for that one.

        NAME may be a pattern as of file names. Raises UsageError for an alias of a model that is not there.
        """
        self.offers = tuple(offers)
        self._any_model = any_model
        self._aliases: dict[str, Offered | None] = {}
        for alias in aliases:
            name, _, model = alias.partition("=")
            if not name or (not model and "=" in alias):
                raise UsageError(f"{ALIAS_FLAG} should be NAME or NAME=MODEL, it is {alias!r}")
            self._aliases[name] = self.find_flag(model, ALIAS_FLAG) if model else None

    @property
    def first(self) -> Offered:
        """The model of requests without a name, while no other one is loaded."""
        return self.offers[0]

    def find_flag(self, name: str, flag: str) -> Offered:
        """Return the model that a flag names. Raises UsageError."""
        found = self._find_own(name)
        if not found:
            names = ", ".join(offer.name for offer in self.offers)
            raise UsageError(f"{flag} names {name!r}, and this server has {names}")
        return found[0]

    def find(self, name: str | None, loaded: Offered | None = None) -> Offered:
        """Return the model that a client means; `loaded` is preferred where a name fits several. Raises BadField."""
        preferred = loaded or self.first
        if not name:
            return preferred
        if name in self._aliases:
            return self._aliases[name] or preferred
        if found := self._find_own(name):
            return loaded if loaded in found else found[0]
        if name == DEFAULT or (self._any_model and len(self.offers) == 1):
            return preferred
        for pattern, model in self._aliases.items():
            if fnmatchcase(name.lower(), pattern.lower()):
                return model or preferred
        raise no_such_model(name, *(offer.name for offer in self.offers))

    def aliases_of(self, offer: Offered, loaded: Offered | None = None) -> tuple[str, ...]:
        """Return the aliases that mean a model now."""
        meant = loaded or self.first
        return tuple(alias for alias, model in self._aliases.items() if (model or meant) is offer)

    def _find_own(self, name: str) -> list[Offered]:
        lower = name.lower()
        same = [offer for offer in self.offers if offer.name.lower() == lower]
        return same or [offer for offer in self.offers if lower in offer.names]


def make_offers(targets: Iterable[Target]) -> list[Offered]:
    """Return what can be offered of these targets, by the copies of their shard sets on this machine.

    Without its copy only the first one is offered, which a server loads at its start: it then learns what it is.
    """
    read: list[tuple[Target, Manifest | None]] = []
    for target in targets:
        manifest = None
        with contextlib.suppress(NotSharded, IntegrityError):
            manifest = read_manifest(Path(target.shards))
        if manifest or not read:
            read.append((target, manifest))
    whole = [manifest for _, manifest in read if manifest]
    offers: list[Offered] = []
    for target, manifest in read:
        name = _choose_name(manifest, whole) if manifest else target.name
        if name in {offer.name for offer in offers}:  # divided otherwise: the one before has the name
            name = target.name
        offers.append(_make_offer(name, target, manifest))
    return offers


def _choose_name(manifest: Manifest, among: Iterable[Manifest]) -> str:
    """Return a model's source; with its quantisation where models of this source differ in that."""
    others = [each.quantization for each in among if each.source == manifest.source]
    mine = manifest.quantization
    if all(other == mine for other in others):
        return manifest.source
    short = all(other == mine or _tell(other) != _tell(mine) for other in others)
    return f"{manifest.source}:{_tell(mine) if short else _tell_all(mine)}"


def _tell(quantization: Quantization | None) -> str:
    """Return a quantisation in one word: 4bit, mxfp4, 16bit where there is none."""
    if quantization is None:
        return "16bit"
    return f"{quantization.bits}bit" if quantization.mode == "affine" else quantization.mode


def _tell_all(quantization: Quantization | None) -> str:
    groups = f"-g{quantization.group_size}" if quantization else ""
    return _tell(quantization) + groups


def _make_offer(name: str, target: Target, manifest: Manifest | None) -> Offered:
    if manifest is None:
        return Offered(name, frozenset(), target, Ready("", None, 1, 1, 0), "", 0, demo=False)
    q, structure = manifest.quantization, manifest.structure
    sources = {manifest.source, manifest.source.rpartition("/")[2]}
    names = {target.name, manifest.name, *sources, *(f"{s}:{t(q)}" for s in sources for t in (_tell, _tell_all))}
    sampling: dict[str, int | float] = {}
    with contextlib.suppress(CheckpointError):  # loading it says so
        sampling = read_sampling(Path(target.shards))
    return Offered(
        name,
        frozenset(each.lower() for each in names),
        target,
        Ready(
            manifest.placement.split,
            q.bits if q else None,
            structure.vocab_size,
            structure.context,
            structure.top_k,
            sampling=sampling,
            tools="",
        ),
        _tell(q),
        sum(entry.bytes for file, entry in manifest.files.items() if file.endswith(".safetensors")),
        demo=manifest.source == demo_dir().name,
    )
