"""Stand-in."""

from dataclasses import dataclass

from moectl.errors import HostsError


@dataclass(frozen=True, slots=True)
class Chip:
    name: str
    title: str
    memory_gib: tuple[int, ...]
    bandwidth_gb_s: float
    gpu_cores: int | None
    fp16_tflops: float | None
    bf16_tflops: float | None
    thunderbolt: int | None
    price_usd: float | None
    price_of: str = ""
    power_w: float | None = None
    source: str = ""

    @property
    def rdma(self) -> bool:
        return self.thunderbolt == 5


CHIPS = {
    c.name: c
    for c in (
        Chip("m2-ultra", "M2 Ultra", (64, 128, 192), 800, 76, 27.2, 27.2, 4, 6599),
        Chip("m3-ultra", "M3 Ultra", (96, 256, 512), 819, 80, 28.4, 28.4, 5, 9499),
        Chip("m4-max", "M4 Max", (36, 48, 64, 128), 546, 40, 18, 18, 5, 3699),
        Chip("m4-pro", "M4 Pro", (24, 48, 64), 273, 20, 9.2, 9.2, 5, 2199),
        Chip("m4", "M4", (16, 24, 32), 120, 10, 4.6, 4.6, 4, 599),
        Chip("m5", "M5", (16, 24, 32), 153, 10, 4.6, 4.6, 4, None),
        Chip("linux-cpu", "CPU", (), 50, None, 0.5, 0.5, None, None),
    )
}


def find_chip(name: str) -> Chip:
    try:
        return CHIPS[name.lower()]
    except KeyError:
        raise HostsError(f"unknown chip {name!r}") from None


def default_working_set_bytes(m: int) -> int:
    return int(m * 2 / 3) if m <= 32 << 30 else int(m * 0.75)


def installed_bytes(chip: Chip, stated: int) -> int:
    return next((g << 30 for g in chip.memory_gib if g * 10**9 == stated), stated)
