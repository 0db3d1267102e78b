"""What MLX's backends say, word for word, and what a user reads then."""

from __future__ import annotations

import contextlib
from pathlib import Path

import mlx.core as mx
import pytest

from moectl.engine import group
from moectl.engine.backend_errors import NO_JACCL, explain_backend
from moectl.engine.isolation import isolated
from moectl.engine.protocol import Connect, Start
from moectl.engine.worker import describe_failure
from moectl.errors import HostUnfit, MoectlError, PeerLate, PeerLost, RemoteError, Unreachable, from_json
from moectl.server.restarts import Restarts

METAL = "[METAL] Command buffer execution failed: "
# As libmlx.dylib and libjaccl.dylib 0.32.4 say it; Metal's own part as users of MLX reported it.
SAID = [
    (
        f"{METAL}Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).",
        *(PeerLate, "gave up waiting for another rank", None),
    ),
    (
        f"{METAL}Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity).",
        *(RemoteError, "to keep its screen responsive", "a smaller --prefill-step"),
    ),
    (
        f"{METAL}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
        *(RemoteError, "too little memory left", "close other programs there"),
    ),
    (
        f"{METAL}Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim).",
        *(PeerLost, "because of another program's error", None),
    ),
    (f"{METAL}Something new (0000000f:kIOGPU).", RemoteError, "Something new", None),
    (
        "[metal::load_device] No Metal device available. This typically occurs in headless, sandboxed, or virtualized "
        "macOS sessions where the GPU is not accessible.",
        *(HostUnfit, "no Metal device", "log in at that Mac's screen once"),
    ),
    ("Cannot initialize jaccl distributed backend.", HostUnfit, "has no JACCL", "--backend ring works without RDMA"),
    (
        "[jaccl] Creating the queue pair failed with 'Resource busy (16)'.",
        *(RemoteError, "Creating the queue pair failed with 'Resource busy (16)'", "end what else uses RDMA there"),
    ),
    ("[jaccl] Register memory region failed", RemoteError, "nothing left to give", "restart that Mac"),
    ("[jaccl] Couldn't allocate protection domain", RemoteError, "nothing left to give", "restart that Mac"),
    (
        "[jaccl] No IPv4-mapped GID for this device. Thunderbolt RDMA ports only publish one once the interface has an "
        "IPv4 address; assign a link-local address to it, for example: ifconfig <interface> inet 169.254.0.1 netmask "
        "255.255.0.0 alias",
        *(RemoteError, "has no IPv4 address", "moectl setup shows the commands"),
    ),
    (
        "[jaccl] Changing queue pair to RTR failed with errno 22",
        *(HostUnfit, "Changing queue pair to RTR failed with errno 22", "if that changes nothing, restart that Mac"),
    ),
    (
        "[jaccl] Changing queue pair to INIT failed with errno 22",
        *(HostUnfit, "Changing queue pair to INIT failed with errno 22", "if that changes nothing, restart that Mac"),
    ),
    (
        "[jaccl] Could not find device rdma_en9 (3 available)",
        *(HostUnfit, "Could not find device rdma_en9 (3 available)", "moectl setup writes the devices that are there"),
    ),
    ("[jaccl] Recv failed with error code 12", PeerLost, "Recv failed", None),
    ("[ring] connection to a peer was lost", PeerLost, "connection to a peer was lost", None),
]


@pytest.mark.parametrize(("text", "kind", "words", "hint"), SAID)
def test_what_a_backend_says_has_a_sentence_and_a_hint(
    text: str, kind: type[MoectlError], words: str, hint: str | None
) -> None:
    told = from_json(describe_failure(RuntimeError(text)).error)
    assert type(told) is kind
    assert words in told.message
    assert "unexpected" not in told.message
    assert (hint or "") in (told.hint or "")
    lasting = Restarts(1).delay_s(told) is None
    assert lasting == (kind is HostUnfit)  # another try may leave an RDMA port in a state that only a restart ends


def test_other_errors_are_not_a_backends() -> None:
    assert explain_backend("[metal::malloc] Attempting to allocate 5 bytes") is None
    told = from_json(describe_failure(RuntimeError("[matmul] bad shapes")).error)
    assert "unexpected RuntimeError" in told.message


def test_an_error_of_the_gpu_is_not_one_answers_own() -> None:
    with pytest.raises(RuntimeError, match="METAL"), isolated(1, lambda error: None):
        raise RuntimeError(SAID[0][0])


class Link:
    """Stands in for a worker's link to the controller."""

    def take(self, kind: type[object]) -> Connect:
        return Connect("jaccl", {}, {})

    def tell(self, event: object) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        # std::invalid_argument is a ValueError in Python.
        (ValueError("[jaccl] Changing queue pair to RTR failed with errno 22"), HostUnfit),
        (RuntimeError("Cannot initialize jaccl distributed backend."), HostUnfit),
        (RuntimeError("[jaccl] Register memory region failed"), RemoteError),
        (RuntimeError("[jaccl] Recv failed with errno=54"), Unreachable),
        (RuntimeError("[ring] Couldn't connect (error: 60)"), Unreachable),
    ],
)
def test_a_rank_that_cannot_join_says_why(
    error: Exception, kind: type[MoectlError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: object) -> None:
        raise error

    monkeypatch.setattr(mx.distributed, "init", fail)
    monkeypatch.setattr(mx.distributed, "is_available", lambda backend: True)
    with pytest.raises(MoectlError) as caught:
        group._join(Link(), Start(0, 2, "", [], 60.0), contextlib.ExitStack())  # type: ignore[arg-type]
    assert type(caught.value) is kind


def test_jaccl_is_not_started_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its init calls into macOS's RDMA library without a look whether that was found."""
    started: list[object] = []
    monkeypatch.setattr(mx.distributed, "init", lambda **options: started.append(options))
    monkeypatch.setattr(mx.distributed, "is_available", lambda backend: False)
    with pytest.raises(HostUnfit, match="has no JACCL"):
        group._join(Link(), Start(0, 2, "", [], 60.0), contextlib.ExitStack())  # type: ignore[arg-type]
    assert started == []


def test_the_installed_library_still_says_it_so() -> None:
    """Of the texts above, those that a wheel for Linux has, too."""
    [library] = (Path(mx.__file__).parent / "lib").glob("libmlx.so")
    strings = library.read_bytes()
    for text in (NO_JACCL.encode(), b"[ring] connection to a peer was lost"):
        assert text in strings
