"""Steps that only Macs have an answer to: RDMA, what keeps them awake, and the memory that stays wired.

The parsers are pure: texts of macOS's tools in, numbers out. Names of processes are counted and not kept.

Sources of the formats: vm_stat(1), pmset(1), `pmset -g assertions` as printed by macOS 15.
"""

from __future__ import annotations

import re
import time

from moectl.cluster.first_hour.stage import Stage, answer
from moectl.cluster.first_hour.step import NOTHING, Data, HourStep, Judgement
from moectl.text import size_text

RDMA_MACOS = (26, 2)
SETTLE_S = 20.0  # for memory to be given back after the last worker has gone
LEFT_PART, LEFT_BYTES = 0.1, 5e8  # of what the workers wired; macOS's own use moves by less
KEPT_AWAKE = ("PreventUserIdleSystemSleep", "PreventSystemSleep")


def no_mac(stage: Stage) -> str:
    """Return why macOS's own tools cannot be asked."""
    return "" if stage.macs else "no host is a Mac"


def parse_wired(vm_stat: str) -> int | None:
    """Return the bytes of wired memory in the output of `vm_stat`."""
    size = re.search(r"page size of (\d{1,9}) bytes", vm_stat)
    pages = re.search(r"^Pages wired down:\s+(\d{1,15})\.", vm_stat, re.MULTILINE)
    return int(size[1]) * int(pages[1]) if size and pages else None


def parse_assertions(text: str) -> dict[str, int]:
    """Return which assertions keep a Mac awake, by name, and how many of them `caffeinate` holds."""
    found = {name: 0 for name in KEPT_AWAKE}
    for name in KEPT_AWAKE:
        if match := re.search(rf"^\s*{name}\s+(\d{{1,6}})\s*$", text, re.MULTILINE):
            found[name] = int(match[1])
    held = re.findall(rf"^\s*pid \d+\(caffeinate\):.*\b(?:{'|'.join(KEPT_AWAKE)})\b", text, re.MULTILINE)
    return {**found, "caffeinate": len(held)}


def measure_rdma(stage: Stage) -> Data:
    """Return for each Mac what its system and its deployed environment have of RDMA."""
    rows = []
    for rank in stage.macs:
        survey, facts = stage.surveys[rank], stage.facts[rank]
        state = survey.sections.get("rdma_ctl", "").strip().lower().removeprefix("rdma is ")
        rows.append(
            {
                "rank": rank,
                "macos": survey.hardware.os_version,
                "macos_of_python": facts.macos,
                "wheel": facts.wheel,
                "jaccl": "jaccl" in facts.backends,
                "rdma_ctl": state if state in ("enabled", "disabled") else "absent",
                "thunderbolt": survey.hardware.thunderbolt,
                "may": (survey.macos_version or (0, 0)) >= RDMA_MACOS,
            }
        )
    return {"hosts": rows}


def judge_rdma(data: Data) -> Judgement:
    """Say where JACCL is missing although macOS has RDMA."""
    rows = data["hosts"]
    lacking = [row for row in rows if row["may"] and not row["jaccl"]]
    on = sum(row["rdma_ctl"] == "enabled" for row in rows)
    there = sum(row["jaccl"] for row in rows)
    came = f"JACCL is in MLX on {there} of {len(rows)} Macs, RDMA is switched on on {on}"
    if not lacking:
        return Judgement(all(row["may"] for row in rows) and on == len(rows), came, _switch_on(rows))
    old = [row for row in lacking if row["macos_of_python"].startswith("16.")]
    why = "their python was built for an older macOS and sees 16" if old else "the wheel is not the one for macOS 26"
    return Judgement(
        False,
        f"{came}: {why}",
        "deploy again; 'moectl doctor' says what mends it",
        "see which wheel pip took: 'wheel' in the report",
    )


def _switch_on(rows: list[Data]) -> str:
    able = [row for row in rows if row["may"] and (row["thunderbolt"] or 0) >= 5 and row["rdma_ctl"] != "enabled"]
    return "switch RDMA on, if these Macs are cabled: 'moectl setup' says how" if able else NOTHING


def measure_wired(stage: Stage) -> Data:
    """Return the wired bytes of each Mac before the workers start, while they have a model, and after they stopped."""
    before = _ask_wired(stage)
    with stage.open_workers() as session:
        answer(session, 1)
        during = _ask_wired(stage)
    until_s = time.monotonic() + stage.scale(SETTLE_S)
    while True:
        after = _ask_wired(stage)
        if time.monotonic() > until_s or not any(_left(b, d, a) for b, d, a in zip(before, during, after, strict=True)):
            return {"macs": stage.macs, "before_bytes": before, "during_bytes": during, "after_bytes": after}
        stage.wait(2.0)


def _ask_wired(stage: Stage) -> list[int | None]:
    return [parse_wired(text) for _, text in sorted(stage.ask_macs("vm_stat").items())]


def _left(before: int | None, during: int | None, after: int | None) -> int:
    """Return the bytes that are still wired after the workers stopped; 0 where that is little, or not known."""
    if before is None or during is None or after is None:
        return 0
    left = after - before
    return left if left > max(LEFT_BYTES, LEFT_PART * (during - before)) else 0


def judge_wired(data: Data) -> Judgement:
    """Say where memory stayed wired."""
    rows = list(zip(data["macs"], data["before_bytes"], data["during_bytes"], data["after_bytes"], strict=True))
    left = {rank: lost for rank, *sizes in rows if (lost := _left(*sizes))}
    wired = [max(0, during - before) for _, before, during, _ in rows if before is not None and during is not None]
    if not wired:
        return Judgement(False, "vm_stat told nothing", developers="see what vm_stat prints there")
    came = f"the workers wired up to {size_text(max(wired))}; "
    if not left:
        return Judgement(True, came + "after their end it is as before")
    where = ", ".join(f"{size_text(size)} on rank {rank}'s Mac" for rank, size in left.items())
    return Judgement(
        False,
        f"{came}still wired after their end: {where}",
        "restart these Macs: nothing else frees that memory",
        "the end of a worker does not free wired memory: see the order of its end",
    )


def measure_sleep(stage: Stage) -> Data:
    """Return the assertions of each Mac before and while workers run."""
    before = [parse_assertions(text) for _, text in sorted(stage.ask_macs("pmset", "-g", "assertions").items())]
    with stage.open_workers() as session:
        answer(session, 1)
        during = [parse_assertions(text) for _, text in sorted(stage.ask_macs("pmset", "-g", "assertions").items())]
    return {"macs": stage.macs, "before": before, "during": during}


def judge_sleep(data: Data) -> Judgement:
    """Say whether the workers keep each Mac awake."""
    pairs = list(zip(data["before"], data["during"], strict=True))
    held = sum(during["caffeinate"] > before["caffeinate"] for before, during in pairs)
    awake = sum(any(during[name] for name in KEPT_AWAKE) for _, during in pairs)
    came = f"the workers hold an assertion on {held} of {len(pairs)} Macs; {awake} would stay awake"
    if held == len(pairs):
        return Judgement(True, came)
    owner = "let the Macs never sleep: 'moectl setup --no-sleep'" if awake < len(pairs) else NOTHING
    return Judgement(False, came, owner, "the worker's caffeinate does not run there: see its log")


RDMA = HourStep(
    "rdma",
    "Is RDMA there in the deployed environment?",
    60,
    "JACCL is there on each Mac with macOS 26.2 or later, and RDMA is switched on",
    "mlx 0.32.4's three macOS wheels: only the one for macOS 26 links it",
    measure_rdma,
    judge_rdma,
    no_mac,
)
SLEEP = HourStep(
    "sleep",
    "Do workers keep their Macs awake?",
    240,
    "they do: 'caffeinate -is' runs as long as a worker",
    "caffeinate(8); nothing else keeps a Mac awake",
    measure_sleep,
    judge_sleep,
    no_mac,
)
WIRED = HourStep(
    "wired memory",
    "Is memory wired after the workers stopped as it was before they started?",
    300,
    "it is as before, within 0.5 GB",
    "omlx#2184, #2855, mlx#3910, exo#1370: hard exits may leave wired memory until a restart",
    measure_wired,
    judge_wired,
    no_mac,
)
