"""What the hints about backends and addresses say is done, and then it succeeds."""

from __future__ import annotations

from typing import Any

import pytest

from moectl.errors import HostsError, UsageError
from moectl.hosts.hostfile import Host, parse_hosts
from moectl.session.backend import choose_backend
from tests.session.test_backend import mesh, neighbours
from tests.session.test_target import addresses


@pytest.mark.parametrize("backend", ["jaccl-ring", "ring"])
def test_the_backend_that_the_hint_names_is_taken(backend: str) -> None:
    hosts = parse_hosts(neighbours(4)).hosts
    with pytest.raises(HostsError) as caught:
        choose_backend("jaccl", hosts)
    assert caught.value.hint == "use --backend jaccl-ring or ring"
    assert choose_backend(backend, hosts) == backend


@pytest.mark.parametrize("backend", ["jaccl", "jaccl-ring"])
def test_a_split_that_needs_the_ring_gets_it_as_the_hint_says(backend: str) -> None:
    hosts = parse_hosts(mesh(3)).hosts
    with pytest.raises(UsageError, match=f"--backend {backend} cannot run --split layers") as caught:
        choose_backend(backend, hosts, split="layers")
    assert caught.value.hint == "use --backend ring, or cut the model with another --split"
    assert choose_backend("ring", hosts, split="layers") == "ring"
    assert choose_backend(backend, hosts, split="hidden") == backend


@pytest.mark.parametrize("connection", ["", "fe80::1 5 fe80::2 22"])
def test_the_line_that_the_hint_asks_for_gives_the_ring_its_address(connection: str) -> None:
    with pytest.raises(HostsError) as caught:
        addresses((Host("a"), connection))
    hint: Any = caught.value.hint
    assert hint == "write 'a ip=10.0.0.1' with its own address in the hosts file"
    [host] = parse_hosts(hint.split("'")[1]).hosts
    assert addresses((host, connection)) == [("10.0.0.1",)]
