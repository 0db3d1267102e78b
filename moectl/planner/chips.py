"""The chips: a table of public figures, each row with its source, and how much memory macOS gives to a Mac's GPU.

Data only; moectl measured nothing of it. Bandwidth, memory sizes, GPU cores, Thunderbolt and prices are the maker's
figures. Apple publishes no TFLOPS: they are cores × 128 lanes × 2 operations × clock, at clocks that others measured
(M1 1.28 GHz, M2 1.40, M3 1.38, M4 1.47 and 1.58 in Pro and Max), for float32 and float16. M5's neural accelerators are
faster in matrix products, but no figure in TFLOPS is public: its rows count the lanes only. M5 Ultra and M6 are not
here: only forecasts of them could be found.
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
    source: str

    @property
    def rdma(self) -> bool:
        """Whether its links can do RDMA: Thunderbolt 5 (macOS ≥ 26.2)."""
        return self.thunderbolt == 5


@dataclass(frozen=True, slots=True)
class Price:
    """What a machine cost at its launch; makers have raised some prices since."""

    chip: str
    memory_gib: int
    usd: float
    machine: str
    source: str


_SPECS = "https://support.apple.com/en-us/"
_NEWS = "https://www.apple.com/newsroom/"
_M5_PRICES = "https://insiderllm.com/guides/apple-m5-pro-max-local-ai"
_M5 = "https://hothardware.com/news/apple-unveils-macbook-pro-m5-pro-m5-max"

_ROWS = (
    Chip("m1", "M1", (8, 16), 68.25, 8, 2.6, 3, _SPECS + "111894"),
    Chip("m1-pro", "M1 Pro", (16, 32), 200, 16, 5.3, 4, _SPECS + "111901"),
    Chip("m1-max", "M1 Max", (32, 64), 400, 32, 10.6, 4, _SPECS + "111900"),
    Chip("m1-ultra", "M1 Ultra", (64, 128), 800, 64, 21.2, 4, _SPECS + "111900"),
    Chip("m2", "M2", (8, 16, 24), 100, 10, 3.6, 4, _SPECS + "111837"),
    Chip("m2-pro", "M2 Pro", (16, 32), 200, 19, 6.8, 4, _SPECS + "111837"),
    Chip("m2-max", "M2 Max", (32, 64, 96), 400, 38, 13.6, 4, _SPECS + "111835"),
    Chip("m2-ultra", "M2 Ultra", (64, 128, 192), 800, 76, 27.2, 4, _SPECS + "111835"),
    Chip("m3", "M3", (8, 16, 24), 100, 10, 3.5, 4, _SPECS + "117735"),
    Chip("m3-pro", "M3 Pro", (18, 36), 150, 18, 6.4, 4, _SPECS + "117736"),
    Chip("m3-max-30", "M3 Max, 30 GPU cores", (36, 96), 300, 30, 10.6, 4, _SPECS + "117736"),
    Chip("m3-max", "M3 Max", (48, 64, 128), 400, 40, 14.1, 4, _SPECS + "117736"),
    Chip("m3-ultra", "M3 Ultra", (96, 256, 512), 819, 80, 28.3, 5, _SPECS + "122211"),
    Chip("m4", "M4", (16, 24, 32), 120, 10, 3.8, 4, _SPECS + "121555"),
    Chip("m4-pro", "M4 Pro", (24, 48, 64), 273, 20, 8.1, 5, _SPECS + "121555"),
    Chip("m4-max-32", "M4 Max, 32 GPU cores", (36,), 410, 32, 12.9, 5, _SPECS + "122211"),
    Chip("m4-max", "M4 Max", (48, 64, 128), 546, 40, 16.2, 5, _SPECS + "122211"),
    Chip("m5", "M5", (16, 24, 32), 153, 10, 4.1, 4, _NEWS + "2025/10/apple-unleashes-m5/"),
    Chip("m5-pro", "M5 Pro", (24, 48, 64), 307, 20, 8.2, 5, _M5),
    Chip(
        "m5-max-32",
        "M5 Max, 32 GPU cores",
        (36,),
        460,
        32,
        13.1,
        5,
        "https://cputronic.com/cpu/apple-m5-max-32-core-gpu",
    ),
    Chip("m5-max", "M5 Max", (48, 64, 128), 614, 40, 16.4, 5, _M5),
    # Two channels of DDR5-5600 are 89.6 GB/s; 8 cores of AVX2 at 3.5 GHz do 0.9 TFLOPS in float32.
    Chip("linux-cpu", "Linux, CPU only", (), 89.6, None, 0.9, None, "JEDEC JESD79-5 (DDR5-5600)"),
    # A thousand TFLOPS in sparse FP4 (NVIDIA) are an eighth of that in dense FP16.
    Chip(
        "gb10", "GB10 (DGX Spark)", (128,), 273, None, 125, None, "https://docs.nvidia.com/dgx/dgx-spark/hardware.html"
    ),
    Chip("h100", "H100 SXM", (80,), 3350, None, 989, None, "https://www.nvidia.com/en-us/data-center/h100/"),
    Chip("h200", "H200 SXM", (141,), 4800, None, 989, None, "https://www.nvidia.com/en-us/data-center/h200/"),
    Chip("dgx-h100", "DGX H100", (640,), 26800, None, 7912, None, "https://www.nvidia.com/en-us/data-center/dgx-h100/"),
)
CHIPS = {chip.name: chip for chip in _ROWS}

# Other sizes of memory have no price: the owner may give one in hosts.txt.
PRICES = (
    Price("m1", 8, 699, "Mac mini", _SPECS + "111894"),
    Price("m1-max", 32, 1999, "Mac Studio", _SPECS + "111900"),
    Price("m1-ultra", 64, 3999, "Mac Studio", _SPECS + "111900"),
    Price("m2", 8, 599, "Mac mini", _SPECS + "111837"),
    Price("m2-pro", 16, 1299, "Mac mini", _SPECS + "111837"),
    Price("m2-max", 32, 1999, "Mac Studio", _SPECS + "111835"),
    Price("m2-ultra", 192, 6599, "Mac Studio", _SPECS + "111835"),
    Price("m3-ultra", 96, 3999, "Mac Studio, 60 GPU cores", "https://english.worldmagazine.it/431260 (Macworld)"),
    Price("m3-ultra", 512, 9499, "Mac Studio", _SPECS + "122211"),
    Price("m4", 16, 599, "Mac mini", _SPECS + "121555"),
    Price("m4-pro", 24, 1399, "Mac mini", _SPECS + "121555"),
    Price("m4-max-32", 36, 1999, "Mac Studio", _SPECS + "122211"),
    Price("m4-max", 128, 3699, "Mac Studio", _SPECS + "122211"),
    Price(
        "m5",
        16,
        1599,
        "MacBook Pro",
        "https://itci.kiev.ua/en/uk-uaapple-onovila-bazovij-macbook-pro-z-chipom-m5-ru-ruapple/amp",
    ),
    Price("m5-pro", 24, 2199, "MacBook Pro", _M5_PRICES),
    Price("m5-max-32", 36, 3599, "MacBook Pro", _M5_PRICES),
    Price("gb10", 128, 3999, "DGX Spark", "https://aiwiki.ai/wiki/nvidia_digits"),
    Price("dgx-h100", 640, 289_000, "8×H100", "arXiv 2506.23635"),
)

# The working set that macOS gives a GPU by default (Metal's recommendedMaxWorkingSetSize): macOS's major version → GiB
# of memory → GiB. Apple does not document it; these are readings by others. 15 (as 13 and 14 before it): logs of
# llama.cpp and ollama, such as their issues 3213 (96), 1870 (64) and 434 (32); for 128 stencel.io, "Apple silicon
# limitations". 26: two machines with 128 (github.com/antirez/ds4/pull/893), one each with 64 and 16.
_READINGS = {
    15: {16: 10.67, 32: 21.33, 64: 48.0, 96: 72.0, 128: 96.0, 192: 144.0},
    26: {16: 11.84, 64: 51.84, 128: 107.52},
}
# The rule of thumb: two thirds of the memory up to here, three quarters above. It is what 15 gives, and less than 26.
_SMALL_GIB = 36
_GIB = 1 << 30


def find_chip(name: str) -> Chip:
    """Return a chip by name: `m2-ultra`, `M2 Ultra`, `Apple M2 Ultra`. Raises HostsError."""
    key = "-".join(name.lower().replace("_", " ").replace("-", " ").removeprefix("apple ").split())
    if key in CHIPS:
        return CHIPS[key]
    raise HostsError(f"unknown chip {name!r}.{did_you_mean(key, CHIPS)}", hint=f"chips are {', '.join(CHIPS)}")


def find_price(chip: Chip, memory_bytes: int) -> float | None:
    """Return what a machine with this chip and memory cost at its launch, in USD; None where that is not known."""
    known = (price for price in PRICES if price.chip == chip.name)
    # Linux counts less than is sold: the kernel keeps a part.
    return next((p.usd for p in known if 0.9 * p.memory_gib * _GIB <= memory_bytes <= p.memory_gib * _GIB), None)


def find_reading(memory_bytes: int, macos: int | None = None) -> int | None:
    """Return the working set, in bytes, that was read on a Mac with this memory and major version of macOS.

    None without a reading. Where the version is not known (None), it is the smallest of all readings.
    """
    if macos is not None and macos < 15:
        macos = 15
    versions = _READINGS.values() if macos is None else [_READINGS.get(macos, {})]
    sizes = [int(read[memory_bytes // _GIB] * _GIB) for read in versions if memory_bytes // _GIB in read]
    return min(sizes, default=None) if memory_bytes % _GIB == 0 else None


def default_working_set_bytes(memory_bytes: int, macos: int | None = None) -> int:
    """Return how much of a Mac's memory macOS gives to the GPU: a reading, else the rule of thumb."""
    found = find_reading(memory_bytes, macos)
    if found is not None:
        return found
    return memory_bytes * 2 // 3 if memory_bytes <= _SMALL_GIB * _GIB else memory_bytes * 3 // 4


def sizes_sold(chip: Chip) -> tuple[int, ...]:
    """Return the memory sizes, in GiB, of all variants of a chip: few owners know which variant they have."""
    plain = re.sub(r"-\d+$", "", chip.name)
    variants = (other for other in CHIPS.values() if re.sub(r"-\d+$", "", other.name) == plain)
    return tuple(sorted({size for other in variants for size in other.memory_gib}))


def installed_bytes(chip: Chip, stated_bytes: int) -> int:
    """Return the bytes that a stated size means: "192GB" means 192 GiB for a chip that is sold with 192 GiB."""
    return next((size * _GIB for size in sizes_sold(chip) if stated_bytes == size * 10**9), stated_bytes)
