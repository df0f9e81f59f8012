"""`m2f2 compare`: trained runs side by side, the seeds of a model together: AUC, tests, cost and pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
from rich.markup import escape

from llava.core.config import build, setting, to_dict
from llava.core.registry import nearest
from llava.core.runtime import atomic_path, write_json, write_run
from llava.core.terminal import text_of, titled_table
from llava.evaluation.comparison import compare
from llava.evaluation.metrics import RankedScores
from llava.evaluation.predictions import Predictions, by_video, read_csv
from llava.evaluation.tables import markdown

# Settings of a run that change neither what is learned nor from what.
NOT_OF_A_MODEL = ("seed", "output_dir", "workers", "resume", "resamples", "near_duplicates", "collapse")
HEADS = ("model", "seeds", "weights", "minutes", "AUC, mean and sd", "AUC of mean score", "difference", "p", "p DeLong")


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Which runs are compared, and with what."""

    runs: tuple[str, ...] = setting(
        help="folders that stage 1 wrote; runs that differ in the seed alone are one model", positional=True
    )
    reference: str | None = setting(None, "model that all others are compared with, by its name (default: the first)")
    level: Literal["frame", "video"] = setting("frame", "what is counted: images, or videos by their mean score")
    resamples: int = setting(2000, "bootstrap resamples over groups")
    seed: int = setting(0, "seed of the resamples")
    output_dir: str = setting("outputs/compare", "folder of compare.json, .csv, .md, .tex and of the pictures")


@dataclass(frozen=True)
class Model:
    """The runs of one recipe, one a seed, with what each scored on test."""

    folders: list[Path]
    scored: list[Predictions]
    settings: dict[str, Any]

    @property
    def mean_score(self) -> Predictions:
        """Give the items with the mean of the seeds' scores."""
        p_fake = np.mean([each.p_fake for each in self.scored], axis=0)
        return Predictions(
            tuple(replace(item, p_fake=float(p), scores={}) for item, p in zip(self.scored[0], p_fake, strict=True))
        )


def compare_runs(settings: CompareSettings) -> str:
    """Compare trained runs on their test split; write tables and pictures, and give the table.

    Differences, and their p values with Holm's correction, are those of the scores averaged over seeds. Raises
    ValueError for runs that were tested on other items, and FileNotFoundError for a folder that is no finished run.
    """
    from llava.evaluation.pictures import draw_aucs, draw_curves, draw_rocs

    models = models_of([Path(run) for run in settings.runs], settings.level)
    reference = settings.reference or next(iter(models))
    if reference not in models:
        raise ValueError(f"reference: no run is called {reference!r}. {nearest(reference, models)}")
    output = Path(settings.output_dir)
    write_run(output, to_dict(settings), settings.seed)
    averaged = {name: model.mean_score for name, model in models.items()}
    found = compare(averaged, reference, settings.resamples, settings.seed)
    rows = {name: _row(model) | found[name] for name, model in models.items()}
    items = averaged[reference]
    about = {"level": settings.level, "items": len(items), "groups": len(set(items.groups)), "reference": reference}
    write_json(output / "compare.json", about | {"models": rows})
    cells = [HEADS, *(_cells(name, row) for name, row in rows.items())]
    _write(output / "compare.csv", cells)
    with atomic_path(output / "compare.tex") as staged:
        staged.write_text(latex(cells, about), encoding="utf-8")
    with atomic_path(output / "compare.md") as staged:
        staged.write_text(markdown(cells), encoding="utf-8")
    draw_aucs(output / "aucs.png", rows)
    draw_rocs(output / "roc.png", averaged)
    draw_curves(output / "curves.png", {name: [_curve(run) for run in model.folders] for name, model in models.items()})
    table = titled_table(
        f"test, {about['items']} {settings.level}s, {about['groups']} groups; differences to {reference}", *HEADS
    )
    for row in cells[1:]:
        table.add_row(*map(escape, row))
    notes = "Intervals: 95 %, bootstrap over groups. p: over groups, and DeLong's over items; both corrected by Holm."
    return f"{text_of(table)}{notes}\nTables and pictures are in {output}\n"


def models_of(runs: Sequence[Path], level: Literal["frame", "video"]) -> dict[str, Model]:
    """Put runs together that differ in the seed alone, by name.

    Raises ValueError for a seed given twice and for other items than those of the first run, FileNotFoundError for a
    folder without numbers.
    """
    by_settings: dict[str, Model] = {}
    first: Predictions | None = None
    for run in runs:
        for name in ("run.json", "metrics.json", "test.csv"):
            if not (run / name).is_file():
                raise FileNotFoundError(
                    f"{str(run)!r} has no {name}; give the folder of a finished run with a test split."
                )
        settings = json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]
        scored = read_csv(run / "test.csv")
        scored = by_video(scored) if level == "video" else scored
        first = first or scored
        _refuse_other_items(first, scored, run, runs[0])
        key = json.dumps({k: v for k, v in settings.items() if k not in NOT_OF_A_MODEL})
        model = by_settings.setdefault(key, Model([], [], settings))
        model.folders.append(run)
        model.scored.append(scored)
    return _named(list(by_settings.values()))


def _refuse_other_items(first: Predictions, scored: Predictions, run: Path, other: Path) -> None:
    wanted, found = ([(p.id, p.label, p.group) for p in items] for items in (first, scored))
    if wanted != found:
        missing = sorted(set(wanted) ^ set(found))
        what = f"{len(missing)} items differ, as {missing[0][0]!r}" if missing else "the order differs"
        raise ValueError(
            f"{str(run)!r} was tested on other items than {str(other)!r}: {what}. Compare runs of one set."
        )


def _named(models: Sequence[Model]) -> dict[str, Model]:
    """Name each model by its folder, without that of the seed; by more of the path where names would be the same."""
    paths = []
    for model in models:
        seeds = [run.name for run in model.folders]
        if len(set(seeds)) < len(seeds) and len({str(run) for run in model.folders}) < len(seeds):
            raise ValueError(f"{str(model.folders[0])!r} is given twice; name each run once.")
        run = model.folders[0]
        paths.append(run.parent if run.name.startswith("seed_") and run.parent.name else run)
    for count in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return dict(zip(names, models, strict=True))
    raise ValueError(f"{', '.join(map(str, paths))}: different recipes have one folder; give each a folder of its own.")


def _row(model: Model) -> dict[str, Any]:
    """Give what is known of a model beside its tests: seeds, AUC of each, weights, minutes."""
    from llava.train.experiments import count_weights
    from llava.train.recipe import Recipe

    numbers = [json.loads((run / "metrics.json").read_text(encoding="utf-8")) for run in model.folders]
    seeds = [json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]["seed"] for run in model.folders]
    aucs = [RankedScores(each.labels, each.p_fake).curve().auc() for each in model.scored]
    spread = stdev(aucs) if len(aucs) > 1 else None
    return {
        "seeds": seeds,
        "aucs": aucs,
        "mean": mean(aucs),
        "sd": spread,
        "weights": count_weights(build(Recipe, model.settings)),
        "minutes": mean(each["minutes"] for each in numbers),
    }


def _cells(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    spread = "" if row["sd"] is None else f" (sd {row['sd']:.3f})"
    tests = [_p(row[test]) if test in row else "" for test in ("p_bootstrap_holm", "p_delong_holm")]
    away = f"{_bounded(row['difference'], '+')}" if "difference" in row else ""
    sizes = (str(len(row["seeds"])), f"{row['weights']:,}", f"{row['minutes']:.1f}")
    return (name, *sizes, f"{row['mean']:.3f}{spread}", _bounded(row["auc"]), away, *tests)


def _bounded(interval: Mapping[str, Any], sign: str = "") -> str:
    value, low, high = (f"{interval[name]:{sign}.3f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}" if p > 1e-300 else "< 1e-300"


def latex(cells: Sequence[Sequence[str]], about: Mapping[str, Any]) -> str:
    """Write the table for LaTeX with booktabs; the reference is bold."""
    special = {ord(c): f"\\{c}" for c in "_%&#"} | {ord("<"): "$<$"}
    lines = [[cell.translate(special) for cell in row] for row in cells]
    head, *body = lines
    bold = [[f"\\textbf{{{row[0]}}}", *row[1:]] if not row[6] else row for row in body]
    caption = f"Test AUC of {about['items']} {about['level']}s in {about['groups']} groups, 95\\,\\% intervals."
    parts = [
        "\\begin{table}[h]",
        "\\centering",
        f"\\begin{{tabular}}{{l{'r' * 3}{'l' * (len(head) - 4)}}}",
        "\\toprule",
        *(f"{' & '.join(row)} \\\\" for row in [head]),
        "\\midrule",
        *(f"{' & '.join(row)} \\\\" for row in bold),
        "\\bottomrule",
        "\\end{tabular}",
        f"\\caption{{{caption}}}",
        "\\end{table}",
    ]
    return "\n".join(parts) + "\n"


def _write(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with atomic_path(path) as staged, staged.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _curve(run: Path) -> list[tuple[int, float]]:
    """Give (step, validation AUC) of a run's phases one after another; not of the best weights, looked at again."""
    points: list[tuple[int, float]] = []
    for path in sorted(run.glob("phases/*/history.json"), key=lambda path: int(path.parent.name)):
        begun = points[-1][0] if points else 0
        history = json.loads(path.read_text(encoding="utf-8"))
        seen = {row["step"]: row["eval_video_auc"] for row in reversed(history) if "eval_video_auc" in row}
        points += [(begun + step, auc) for step, auc in sorted(seen.items())]
    return points
