"""The names of a server's models: stable ones, aliases, and what a request's name means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moectl.demo import demo_dir
from moectl.errors import BadField, UsageError
from moectl.model.manifest import Manifest, read_manifest, write_manifest
from moectl.model.structure import Quantization
from moectl.server.menu import Menu, Offered, make_offers
from moectl.session.target import Local
from moectl.shards import prepare
from moectl.shards.prepare import Wanted

FOUR, FINE, MX = Quantization(4, 64), Quantization(4, 32), Quantization(4, 32, "mxfp4")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    directory = tmp_path_factory.mktemp("cut") / "set"
    return read_manifest(prepare.shard(str(demo_dir()), Wanted(nodes=1), directory=directory).directory)


@pytest.fixture
def make(demo: Manifest, tmp_path: Path) -> Make:
    return Make(demo, tmp_path)


class Make:
    """Offers of sets that differ as a test says; of a set, only the manifest is there."""

    def __init__(self, manifest: Manifest, root: Path) -> None:
        self.manifest, self.root = manifest, root

    def __call__(self, *wanted: tuple[str, str, Quantization | None]) -> list[Offered]:
        targets = []
        for name, source, quantization in wanted:
            directory = self.root / name
            directory.mkdir()
            write_manifest(directory, replace(self.manifest, name=name, source=source, quantization=quantization))
            targets.append(Local(directory, read_manifest(directory)))
        return make_offers(targets)


def test_a_quantisation_is_in_a_name_only_where_two_differ(make: Make) -> None:
    offers = make(
        ("a4", "db/a", FOUR),
        ("a16", "db/a", None),
        ("a4-other", "db/a", FOUR),
        ("b", "db/b", FOUR),
        ("c64", "db/c", FOUR),
        ("c32", "db/c", FINE),
        ("cmx", "db/c", MX),
    )
    assert [offer.name for offer in offers] == [
        "db/a:4bit",
        "db/a:16bit",
        "a4-other",
        "db/b",
        "db/c:4bit-g64",
        "db/c:4bit-g32",
        "db/c:mxfp4",
    ]
    assert [offer.quantization for offer in offers[:2]] == ["4bit", "16bit"]


def test_clients_need_not_change_when_a_model_is_cut_again_or_in_another_precision(make: Make) -> None:
    one = Menu(make(("a-q4-hidden-4", "db/a", FOUR)))
    for name in ("db/a", "DB/A", "a", "a-q4-hidden-4", "db/a:4bit", "a:4bit-g64"):
        assert one.find(name) is one.first
    two = Menu(make(("a-q4-experts-4", "db/a", FOUR), ("a-16", "db/a", None)))
    four, sixteen = two.offers
    assert two.find("db/a") is four
    assert two.find("db/a", sixteen) is sixteen  # no switch for a name that fits what is loaded
    assert two.find("db/a:4bit", sixteen) is four
    assert two.find("a-16") is sixteen


def test_aliases_patterns_and_default(make: Make) -> None:
    menu = Menu(make(("a", "db/a", FOUR), ("b", "db/b", FOUR)), aliases=("local", "big=db/b", "claude-*", "gpt-?=b"))
    a, b = menu.offers
    for name in ("local", "default", "claude-sonnet-4-5", "Claude-Opus", "", None):
        assert menu.find(name) is a
        assert menu.find(name, b) is b
    for name in ("big", "gpt-4", "db/b"):
        assert menu.find(name, a) is b
    assert menu.aliases_of(a) == ("local", "claude-*")
    assert menu.aliases_of(b) == ("big", "gpt-?")
    assert Menu(menu.offers, aliases=("*",)).find("b") is b  # a pattern hides no model


def test_an_unknown_name_is_taken_only_where_it_is_wanted_and_can_mean_one_model(make: Make) -> None:
    offers = make(("a", "db/a", FOUR), ("b", "db/b", FOUR))
    assert Menu(offers[:1], any_model=True).find("gpt-4") is offers[0]
    with pytest.raises(BadField, match="model \"gpt-4\" is not served here, 'db/a', 'db/b' are") as caught:
        Menu(offers, any_model=True).find("gpt-4")
    assert caught.value.code == "model_not_found"
    with pytest.raises(BadField, match="'db/a' is"):
        Menu(offers[:1]).find("gpt-4")


@pytest.mark.parametrize("alias", ["", "=a", "x=", "x=c"])
def test_a_wrong_alias_is_refused(make: Make, alias: str) -> None:
    with pytest.raises(UsageError, match="--alias"):
        Menu(make(("a", "db/a", FOUR)), aliases=(alias,))


def test_what_is_known_before_it_is_loaded(make: Make, tmp_path: Path) -> None:
    toy, other = make(("a", "moectl-demo", None), ("b", "db/b", FOUR))
    assert (toy.demo, other.demo) == (True, False)
    structure = make.manifest.structure
    assert (other.model.max_seq_len, other.model.vocab_size, other.model.bits) == (
        structure.context,
        structure.vocab_size,
        4,
    )
    assert toy.bytes == sum(entry.bytes for name, entry in make.manifest.files.items() if "safetensors" in name)
    gone = Local(tmp_path / "gone", make.manifest)
    assert [offer.name for offer in make_offers([gone, toy.target])] == ["gone", "moectl-demo"]
    assert [offer.name for offer in make_offers([toy.target, gone])] == ["moectl-demo"]
