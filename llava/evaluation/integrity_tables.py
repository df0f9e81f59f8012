"""The integrity report as tables for a terminal: leaks, templates, swaps, flips, regions, maps, edits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from llava.core.types import LABEL_NAMES
from llava.evaluation.grounding import ARTEFACT, EDITS, NONE, REGION, SEVERAL, Naming
from llava.evaluation.tables import CAPTION_ROWS, interval_text, titled_table

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


SYSTEMS = {
    "predictions": "predictions",
    "kind": "blind template\n(kind of question)",
    "question": "blind template\n(whole question)",
    "own_verdict": "template told the\npredicted verdict",
}


def integrity_tables(report: Mapping[str, Any]) -> list[Table]:
    """Give a table per part of the report; parts that are None give none."""
    tables = [_leak_table(report["leak"]), *_template_tables(report), *_swap_tables(report["swap"])]
    if report["flip"] is not None:
        tables.append(_flip_table(report["flip"]))
    return tables + grounding_tables(report)


def _leak_table(leak: Mapping[str, Any]) -> Table:
    table = titled_table(
        f"Does the question give the label away? {leak['distinct_questions']} distinct questions, "
        f"{leak['unseen_questions']} asked with a text that training lacks",
        "",
        "value",
    )
    for key, title in (
        ("test", "test questions"),
        ("prompts", "prompts of the predictions"),
        ("training", "training questions"),
    ):
        if (counts := leak[key]) is not None:
            wrong = f" ({counts['false']} state the other one)" if counts["false"] else ""
            table.add_row(f"{title} that state the label", f"{counts['true']} of {counts['n']}{wrong}")
    told = leak["predictability"]
    table.add_row("label right from the question's text alone", interval_text(told["question"]))
    table.add_row("label right by its share in training alone", interval_text(told["prior"]))
    table.add_row("difference", interval_text(told["gain"]))
    return table


def _template_tables(report: Mapping[str, Any]) -> list[Table]:
    template, n = report["template"], report["n"]
    kinds = f"; {lacks} questions of a kind that training lacks" if (lacks := template["unseen"]["kind"]) else ""
    scores = titled_table(
        f"{n['items']} questions, {n['groups']} groups, {n['training']} training answers; {len(n['missing'])} missing "
        f"(scored as empty), {len(n['extra'])} extra (left out)\ntemplate: {template['rule']}{kinds}",
        "",
        *(SYSTEMS[name] for name in template["scores"]),
    )
    gaps = titled_table(
        "Predictions minus template, same resamples", "", *(SYSTEMS[name] for name in template["difference"])
    )
    for table, part in ((scores, "scores"), (gaps, "difference")):
        for key, title in CAPTION_ROWS:
            if key in template["scores"]["predictions"]:
                table.add_row(title, *(interval_text(row[key]) for row in template[part].values()))
    scores.add_row("distinct answers", *(str(count) for count in template["distinct_answers"].values()))
    return [scores, gaps]


def _swap_tables(swap: Mapping[str, Any]) -> list[Table]:
    titles = {"all": "all other images with the same question", "same_label": "those of the same label only"}
    tables = []
    for key, title in titles.items():
        part = swap[key]
        if part is None or not part["n"]:
            continue
        table = titled_table(
            f"Swap gap against {title}: {part['n']} answers, {part['alone']} without another image",
            "",
            "own image",
            "other images",
            "gap",
        )
        for metric, name in CAPTION_ROWS:
            if metric in part["gap"]:
                table.add_row(name, *(interval_text(part[column][metric]) for column in ("own", "swapped", "gap")))
        tables.append(table)
    return tables


def _flip_table(flip: Mapping[str, Any]) -> Table:
    table = titled_table(f"Label flip: {flip['n']} questions asked again with the other label stated", "", "value")
    table.add_row("answer follows the flipped statement", interval_text(flip["follows"]))
    for name in LABEL_NAMES:
        table.add_row(f"  {name} images", interval_text(flip["by_label"][name]))
    table.add_row("answer agreed with the true statement before", interval_text(flip["before"]))
    table.add_row("answer says what is stated both times", interval_text(flip["both"]))
    table.add_row("same text both times", interval_text(flip["unchanged"]))
    table.add_row("references whose label is read rightly", interval_text(flip["reader"]))
    table.add_row("questions left out", str(flip["left_out"]))
    return table
