"""Tables of what the integrity report says of edited regions: words, maps and counterfactual scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from llava.evaluation.counterfactual import EDITS
from llava.evaluation.regions import ARTEFACT, NONE, REGION, SEVERAL, Naming
from llava.evaluation.report import interval_text, titled_table

POINTING_ROWS = {
    "hit": "maximum of the map in the mask",
    "chance": "a cell at random (mean mask area)",
    "centre": "centre: maximum of the mean map",
    "other": "maps of other images",
    "best": "best cell of that grid",
}


def grounding_tables(report: Mapping[str, Any]) -> list[Table]:
    """Give the tables of regions, artefacts, pointing game and counterfactual; parts that are None give none."""
    tables: list[Table] = []
    for name, naming in (("regions", REGION), ("artefacts", ARTEFACT)):
        if report[name] is not None:
            tables += _naming_tables(naming, report[name])
    if report["pointing"] is not None:
        tables += _pointing_tables(report["pointing"])
    if report["counterfactual"] is not None:
        tables.append(_counterfactual_table(report["counterfactual"]))
    return tables


def _naming_tables(naming: Naming, part: Mapping[str, Any]) -> list[Table]:
    named = part["named"]
    table = titled_table(
        f"Does the text name the edited {naming.field}? {part['n']} locally edited images; {named['one']} answers name "
        f"one {naming.field}, {named[NONE]} none, {named[SEVERAL]} several (both wrong)",
        "",
        "value",
        "predictions minus it",
    )
    table.add_row("predictions", interval_text(part["accuracy"]), "")
    gain = {name: interval_text(interval) for name, interval in part["gain"].items()}
    chance = part["chance"]
    table.add_row(f"chance (one of {chance['of']})", f"{chance['value']:.4f}", gain["chance"])
    for name, title in (("guess", "blind guess"), ("template", "blind template")):
        rival = part[name]
        table.add_row(f"{title} ({', '.join(rival['names'])})", interval_text(rival["accuracy"]), gain[name])
    if (swap := part["swap"])["n"]:
        values = (swap["swapped"]["accuracy"], swap["gap"]["accuracy"])
        table.add_row("predictions, images swapped", *map(interval_text, values))
    columns = confusion_columns(naming, part)
    heads = [name.replace("_", "\n") for name in columns]
    confusion = titled_table(f"Edited {naming.field} (rows) and {naming.field} named (columns)", "", *heads)
    elsewhere = {f"(other {label} images)": said for label, said in part["elsewhere"].items()}
    for name, said in (part["confusion"] | elsewhere).items():
        confusion.add_row(name, *(str(said.get(column, 0)) for column in columns))
    return [table, confusion]


def confusion_columns(naming: Naming, part: Mapping[str, Any]) -> list[str]:
    """List what is true or named anywhere in a naming report, in the order of the naming, then none and several."""
    rows = (part["confusion"] | part["elsewhere"]).values()
    used = {*part["confusion"], *(name for said in rows for name in said)}
    return [*(name for name in naming.names if name in used), NONE, SEVERAL]


def _pointing_tables(part: Mapping[str, Any]) -> list[Table]:
    left_out = ", ".join(f"{count} {reason}" for reason, count in part["left_out"].items() if count) or "none"
    table = titled_table(
        f"Pointing game: {part['n']} locally edited images, {part['groups']} groups; left out: {left_out}",
        "",
        "part of it in the mask",
        "map minus it",
    )
    for key, title in POINTING_ROWS.items() if part["n"] else ():
        gain = interval_text(part["gain"][key]) if key in part["gain"] else ""
        table.add_row(title, interval_text(part[key]), gain)
    columns = ("hit", "chance", "centre", "other")
    regions = titled_table("Pointing game by edited region", "region", "images", *columns)
    for name, row in part["by_region"].items():
        regions.add_row(name, str(row["n"]), *(interval_text(row[column]) for column in columns))
    return [table, regions]


def _counterfactual_table(part: Mapping[str, Any]) -> Table:
    left_out = ", ".join(f"{count} {reason}" for reason, count in part["left_out"].items()) or "none"
    regions = f", {part['random_regions']} random regions each" if part["n"] else ""
    table = titled_table(f"Counterfactual: {part['n']} answers{regions}; left out: {left_out}", "", "value")
    if not part["n"]:
        return table
    done = EDITS[part["edit"]]
    for key, title in (
        ("named", f"p_fake falls by, named region {done}"),
        ("random", f"p_fake falls by, random region {done}"),
        ("difference", "difference"),
    ):
        table.add_row(title, interval_text(part["drop"][key]))
    table.add_row("random regions that lower p_fake less (chance 0.5)", interval_text(part["rank"]))
    for name, row in part["by_truth"].items():
        table.add_row(f"difference, {name} region named ({row['n']})", interval_text(row["difference"]))
    return table
