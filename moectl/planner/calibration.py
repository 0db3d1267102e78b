"""The constants of the speed model with their sources: `paper`, `paper-naive`, `default` and `peers`. Data only.

`paper` is the software of arXiv 2506.23635 on M2 Ultra Mac Studios over 10 GbE. Its times per layer at 2 and 4 nodes,
3.15 and 2.39 ms beside 0.94 and 1.18 ms of communication (6.1 and 7.0 tok/s; 23 and 33 %), give a line through the
bytes that the busiest node reads (1.23 and 0.80 GB): 70 % of the 800 GB/s, and 0.97 ms that do not depend on them;
72 % and 0.95 ms meet its four-node cluster better, whose experts have copies here and there. The paper calls the
latter driver processing: Metal wires weights that were idle. At least 96 % of its communication is latency and
software, so the size of a message hardly matters, and each further node adds 0.12 ms.

NVIDIA's machine has no such driver. From its 1.15 times less tok/s per USD (at 22 times the price) follow 0.12 ms per
layer for launches and NVLink, besides reading the bytes.

`paper-naive` is the same before the paper's three ideas, 1.2 tok/s at 2 nodes, 20.8 ms per layer. Without P and L,
Metal wires every expert's weights again: the experts took 5.2 times as long, 14.8 ms instead of 2.8 ms, so the
driver's part grows by 12.0 ms. Without D one node sends all inputs and collects all outputs: of the 20.8 ms, 5.7 ms
are left for communication, 6 times the decentralised exchange.

`default` is what moectl expects of today's software: 80 % of the bandwidth and 2.6 µs for each launch of an operation,
100 µs for a layer of DBRX, because the graph of the next step is built while this one runs (building takes 140 µs per
layer, measured on Linux) and `mx.set_wired_limit` avoids the wiring. In `experts` the host has to read the router's
choice before it launches the rank's own experts: 120 µs more. The collectives are published ranges at 2 and 4 nodes:
RDMA 20-25 µs (27-31 µs seen in an app, 4 µs raw), TCP over Thunderbolt 150-300 µs, 10 GbE 500-700 µs. That of 1 GbE is
10 GbE's with 100 µs more for the switch, an estimate. moectl measured nothing of `default` on a Mac; `plan --probe`
measures a cluster.

`peers` is the software that clusters of Macs run today (exo with MLX's RDMA, split by `tensor`), fitted to what is
published of 1 and 4 M3 Ultras: Qwen3-235B at 8 bits 19.5 and 31.9 tok/s, DeepSeek V3.1 at 4 bits 21.1 and 32.5. Reading
the weights takes a quarter of the time on 4 nodes. What does not scale is the time per layer: an operation is launched
on every node, however little it reads. 5.3 µs per launch meet all four within 7 %: 185 µs for a layer of Qwen3 (35
launches), 265 µs for one of DeepSeek (50), where 200 to 350 µs per layer are reported. An exchange takes the 27 to
31 µs that were seen in an app.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moectl.errors import UsageError


@dataclass(frozen=True, slots=True)
class LinkCost:
    """The cost of one collective over a kind of link."""

    name: str
    latency_s: float  # at 2 nodes
    per_node_s: float  # more for each further node
    bytes_s: float  # of the wire, one direction


@dataclass(frozen=True, slots=True)
class Calibration:
    """One set of constants."""

    name: str
    memory_efficiency: float  # of a chip's memory bandwidth
    compute_efficiency: float  # of a chip's peak
    layer_overhead_s: float  # per layer, on every node at once,
    launch_s: float  # and for each operation of a layer
    sync_s: float  # per layer where the host has to read the router's choice (`experts`)
    agreement: bool  # whether a step ends with an exchange of its token
    links: Mapping[str, LinkCost]
    nvidia_overhead_s: float = 0.10e-3  # instead of both, on NVIDIA's GPUs


USUAL_LAUNCHES = 40  # of a layer whose operations are not known

_WIRES = {"10gbe": 1.25e9, "1gbe": 0.125e9, "tb-tcp": 2.5e9, "rdma": 6.0e9}

PAPER = Calibration(
    "paper",
    memory_efficiency=0.72,
    compute_efficiency=0.50,
    layer_overhead_s=0.95e-3,
    launch_s=0.0,  # in the overhead
    sync_s=0.0,  # in the overhead
    agreement=False,
    # The same on every wire: the time that was measured at 10 GbE is that of the software.
    links={name: LinkCost(name, 0.94e-3, 0.12e-3, speed) for name, speed in _WIRES.items()},
    nvidia_overhead_s=0.12e-3,
)

_REWIRING_S = 12.0e-3  # no P, no L: wiring experts that are neither stacked nor kept busy
_CENTRALISED_S = 5.7e-3  # no D: handing out and collecting through one node
PAPER_NAIVE = replace(
    PAPER,
    name="paper-naive",
    layer_overhead_s=PAPER.layer_overhead_s + _REWIRING_S,
    links={name: LinkCost(name, _CENTRALISED_S, 0.12e-3, speed) for name, speed in _WIRES.items()},
)

DEFAULT = Calibration(
    "default",
    memory_efficiency=0.80,
    compute_efficiency=0.50,
    layer_overhead_s=0.0,
    launch_s=0.10e-3 / 39,
    sync_s=0.12e-3,
    agreement=True,
    links={
        "rdma": LinkCost("rdma", 20e-6, 2.5e-6, _WIRES["rdma"]),
        "tb-tcp": LinkCost("tb-tcp", 150e-6, 75e-6, _WIRES["tb-tcp"]),
        "10gbe": LinkCost("10gbe", 500e-6, 100e-6, _WIRES["10gbe"]),
        "1gbe": LinkCost("1gbe", 600e-6, 100e-6, _WIRES["1gbe"]),
    },
)

PEERS = replace(
    DEFAULT,
    name="peers",
    launch_s=5.3e-6,
    agreement=False,
    links={**DEFAULT.links, "rdma": LinkCost("rdma", 27e-6, 2e-6, _WIRES["rdma"])},
)

CALIBRATIONS: Mapping[str, Calibration] = {c.name: c for c in (PAPER, PAPER_NAIVE, DEFAULT, PEERS)}
LINKS = tuple(DEFAULT.links)


def find_link(calibration: Calibration, name: str) -> LinkCost:
    """Return a kind of link by name. Raises UsageError."""
    try:
        return calibration.links[name]
    except KeyError:
        raise UsageError(f"unknown link {name!r}; it is one of {', '.join(LINKS)}") from None
