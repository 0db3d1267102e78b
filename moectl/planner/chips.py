"""The chips: a table of public figures, each row with its source, and how much memory macOS gives to a Mac's GPU.

Data only; moectl measured nothing of it. Bandwidth, memory sizes, GPU cores, Thunderbolt and prices are the maker's
figures. Apple publishes no TFLOPS: they are cores × 128 lanes × 2 operations × clock, at clocks that others measured
(M1 1.28 GHz, M2 1.40, M3 1.38, M4 1.47 and 1.58 in Pro and Max), for float32 and float16. M5's neural accelerators are
faster in matrix products, but no figure in TFLOPS is public: its rows count the lanes only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moectl.errors import HostsError
from moectl.text import did_you_mean


@dataclass(frozen=True, slots=True)
class Chip:
    """One chip, or for `dgx-h100` one machine. GB/s in powers of 1000, memory in GiB as it is sold."""

    name: str  # as written in hosts.txt; the largest of several variants has the plain name
    title: str
    memory_gib: tuple[int, ...]
    bandwidth_gb_s: float
    gpu_cores: int | None
    fp16_tflops: float
    thunderbolt: int | None  # generation
    price_usd: float | None  # list price at launch of …
    price_of: str  # … this machine
    source: str

    @property
    def rdma(self) -> bool:
        """Whether its links can do RDMA: Thunderbolt 5 (macOS ≥ 26.2)."""
        return self.thunderbolt == 5


_SPECS = "https://support.apple.com/en-us/"
_NEWS = "https://www.apple.com/newsroom/"

_ROWS = (
    Chip("m1", "M1", (8, 16), 68.25, 8, 2.6, 3, 699, "Mac mini, 8 GB", _SPECS + "111894"),
    Chip("m1-pro", "M1 Pro", (16, 32), 200, 16, 5.3, 4, None, "", _SPECS + "111901"),
    Chip("m1-max", "M1 Max", (32, 64), 400, 32, 10.6, 4, 1999, "Mac Studio, 32 GB", _SPECS + "111900"),
    Chip("m1-ultra", "M1 Ultra", (64, 128), 800, 64, 21.2, 4, 3999, "Mac Studio, 64 GB", _SPECS + "111900"),
    Chip("m2", "M2", (8, 16, 24), 100, 10, 3.6, 4, 599, "Mac mini, 8 GB", _SPECS + "111837"),
    Chip("m2-pro", "M2 Pro", (16, 32), 200, 19, 6.8, 4, 1299, "Mac mini, 16 GB", _SPECS + "111837"),
    Chip("m2-max", "M2 Max", (32, 64, 96), 400, 38, 13.6, 4, 1999, "Mac Studio, 32 GB", _SPECS + "111835"),
    Chip("m2-ultra", "M2 Ultra", (64, 128, 192), 800, 76, 27.2, 4, 6599, "Mac Studio, 192 GB", _SPECS + "111835"),
    Chip("m3", "M3", (8, 16, 24), 100, 10, 3.5, 4, None, "", _SPECS + "117735"),
    Chip("m3-pro", "M3 Pro", (18, 36), 150, 18, 6.4, 4, None, "", _SPECS + "117736"),
    Chip("m3-max-30", "M3 Max, 30 GPU cores", (36, 96), 300, 30, 10.6, 4, None, "", _SPECS + "117736"),
    Chip("m3-max", "M3 Max", (48, 64, 128), 400, 40, 14.1, 4, None, "", _SPECS + "117736"),
    Chip("m3-ultra", "M3 Ultra", (96, 256, 512), 819, 80, 28.3, 5, 9499, "Mac Studio, 512 GB", _SPECS + "122211"),
    Chip("m4", "M4", (16, 24, 32), 120, 10, 3.8, 4, 599, "Mac mini, 16 GB", _SPECS + "121555"),
    Chip("m4-pro", "M4 Pro", (24, 48, 64), 273, 20, 8.1, 5, 1399, "Mac mini, 24 GB", _SPECS + "121555"),
    Chip("m4-max-32", "M4 Max, 32 GPU cores", (36,), 410, 32, 12.9, 5, 1999, "Mac Studio, 36 GB", _SPECS + "122211"),
    Chip("m4-max", "M4 Max", (48, 64, 128), 546, 40, 16.2, 5, 3699, "Mac Studio, 128 GB", _SPECS + "122211"),
    Chip("m5", "M5", (16, 24, 32), 153, 10, 4.1, 4, None, "", _NEWS + "2025/10/apple-unleashes-m5/"),
    Chip("m5-pro", "M5 Pro", (24, 48, 64), 307, 20, 8.2, 5, None, "", _NEWS + "2026/03/"),
    Chip("m5-max-32", "M5 Max, 32 GPU cores", (36,), 460, 32, 13.1, 5, None, "", _NEWS + "2026/03/"),
    Chip("m5-max", "M5 Max", (48, 64, 128), 614, 40, 16.4, 5, None, "", _NEWS + "2026/03/"),
    # Two channels of DDR5-5600 are 89.6 GB/s; 8 cores of AVX2 at 3.5 GHz do 0.9 TFLOPS in float32.
    Chip("linux-cpu", "Linux, CPU only", (), 89.6, None, 0.9, None, None, "", "JEDEC JESD79-5 (DDR5-5600)"),
    Chip("h100", "H100 SXM", (80,), 3350, None, 989, None, None, "", "https://www.nvidia.com/en-us/data-center/h100/"),
    Chip("h200", "H200 SXM", (141,), 4800, None, 989, None, None, "", "https://www.nvidia.com/en-us/data-center/h200/"),
    Chip("dgx-h100", "DGX H100", (640,), 26800, None, 7912, None, 289_000, "8×H100", "arXiv 2506.23635 (price)"),
)
CHIPS = {chip.name: chip for chip in _ROWS}

# The working set that macOS gives a GPU by default (recommendedMaxWorkingSetSize), GiB of RAM → GiB. 128 was read on
# two machines with macOS 26 (github.com/antirez/ds4/pull/893), the others on macOS 14 and 15.
_WORKING_SETS = {16: 10.67, 32: 21.33, 64: 48.0, 96: 72.0, 128: 107.52, 192: 144.0}
_SMALL_GIB = 36  # up to here two thirds of the memory, above three quarters
_GIB = 1 << 30


def find_chip(name: str) -> Chip:
    """Return a chip by name: `m2-ultra`, `M2 Ultra`, `Apple M2 Ultra`. Raises HostsError."""
    key = "-".join(name.lower().replace("_", " ").replace("-", " ").removeprefix("apple ").split())
    if key in CHIPS:
        return CHIPS[key]
    raise HostsError(f"unknown chip {name!r}.{did_you_mean(key, CHIPS)}", hint=f"chips are {', '.join(CHIPS)}")


def default_working_set_bytes(memory_bytes: int) -> int:
    """Return how much of a Mac's memory macOS gives to the GPU when iogpu.wired_limit_mb is 0."""
    known = _WORKING_SETS.get(memory_bytes // _GIB) if memory_bytes % _GIB == 0 else None
    if known is not None:
        return int(known * _GIB)
    return memory_bytes * 2 // 3 if memory_bytes <= _SMALL_GIB * _GIB else memory_bytes * 3 // 4


def sizes_sold(chip: Chip) -> tuple[int, ...]:
    """Return the memory sizes, in GiB, of all variants of a chip: few owners know which variant they have."""
    plain = re.sub(r"-\d+$", "", chip.name)
    variants = (other for other in CHIPS.values() if re.sub(r"-\d+$", "", other.name) == plain)
    return tuple(sorted({size for other in variants for size in other.memory_gib}))


def installed_bytes(chip: Chip, stated_bytes: int) -> int:
    """Return the bytes that a stated size means: "192GB" means 192 GiB for a chip that is sold with 192 GiB."""
    return next((size * _GIB for size in sizes_sold(chip) if stated_bytes == size * 10**9), stated_bytes)
