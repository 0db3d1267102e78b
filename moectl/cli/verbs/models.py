"""`moectl models`: the families of models, the ways to split them, and what Macs hold them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from moectl.cli import suggest
from moectl.cli.options import Common, common
from moectl.cli.verb import verb
from moectl.text import columns, parameters_text, size_text, table_text

if TYPE_CHECKING:
    from moectl.planner.families import Example, Family


def models_text(families: list[Family], *, width: int | None = None) -> str:
    """Return the table of all families."""
    header = ("FAMILY", "SPLITS", "COMPARED WITH", "MACS", "4 BITS", "EXAMPLE")
    rows = [_family_row(family) for family in families]
    table = table_text(header, rows, right="e", width=width or columns())
    return f"{table}\n{len(families)} families; moectl models FAMILY says more of one."


def _family_row(family: Family) -> tuple[str, ...]:
    splits = " ".join(family.splits) or "none"
    if not family.examples:
        return (family.name, splits, family.verified, "", "", family.repository or "")
    example = family.examples[0]
    return (family.name, splits, family.verified, _macs_text(example), size_text(example.bytes), example.name)


def _macs_text(example: Example) -> str:
    if example.macs is None:
        return "none"
    count, gib = example.macs
    return f"{count} × {gib} GB"


def family_text(family: Family, *, width: int | None = None) -> str:
    """Return what is known of one family."""
    compared = family.verified if " " in family.verified else f"compared with {family.verified}"
    lines = [f"{family.name}: splits {', '.join(family.splits) or 'none'}; {compared}"]
    if family.aliases:
        lines.append(f"It also reads model types {', '.join(family.aliases)}.")
    if family.differs:
        lines.append(f"It differs from transformers: {family.differs}.")
    lines += [f"Not --split {split}: {why}." for split, why in family.refused.items()]
    if family.examples:
        header = ("MODEL", "PARAMETERS", "4 BITS", "SMALLEST CLUSTER OF MACS")
        rows = [
            (example.name, parameters_text(example.parameters), size_text(example.bytes), _macs_text(example))
            for example in family.examples
        ]
        lines.append(table_text(header, rows, right="bc", width=width or columns()))
    elif family.repository:
        lines.append(f"Example: {family.repository} (moectl plan reads its headers)")
    return "\n".join(lines)


def models_json(families: list[Family]) -> dict[str, Any]:
    """Return the document of `models --json`."""
    return {"schema": "moectl.models/1", "families": [{**asdict(f), "splits": list(f.splits)} for f in families]}


@verb("Prepare")
@click.argument("family", required=False, shell_complete=suggest.families)
@common
def models(common: Common, family: str | None) -> None:
    """Show which families of models there are, how they can be split, and which Macs hold them.

    A family is a model file of mlx-lm. COMPARED WITH says with what moectl's tests compare the results of its splits:
    transformers, or mlx-lm's own unsplit model. MACS is the cluster with the least memory that holds the example at 4
    bits with 4096 tokens of context.

    \b
    Examples:
      moectl models
      moectl models deepseek_v3
      moectl models --json
    """
    from moectl.planner.families import find_family, list_families

    if family is not None:
        found = find_family(family)
        common.print(family_text(found), models_json([found]))
        return
    families = list_families()
    common.print(models_text(families), models_json(families))
