"""Stand-in."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hardware:
    chip: str | None = None
    memory_bytes: int | None = None
    in_use_bytes: int | None = None
    working_set_bytes: int | None = None
