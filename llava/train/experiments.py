"""Variants of a recipe, each trained with the same seeds on the same data: `m2f2 ablate PLAN.yaml`.

A run is a process of its own with a log of its own, so that nothing of one is left in memory, or in a generator of
random numbers, when the next begins. What there is to know of a run lies in its folder; a plan is gone on with by
giving it again.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from llava.core.config import assign, build, load_yaml, merge, setting, to_dict
from llava.core.registry import nearest
from llava.core.runtime import Incomplete, atomic_path, write_json, write_run
from llava.core.terminal import text_of, titled_table
from llava.core.weights import shapes_only
from llava.detectors.base import create
from llava.evaluation.tables import interval_text
from llava.train import stage_1
from llava.train.engine import HISTORY
from llava.train.recipe import PhaseConfig, Recipe, open_phase

log = logging.getLogger(__name__)
Row: TypeAlias = dict[str, Any]
OUTCOME, LOG, RECIPE, TABLE = "outcome.json", "log.txt", "recipe.yaml", "runs.json"
WAITING, FINISHED, COLLAPSED, FAILED, STOPPED = "waiting", "finished", "collapsed", "failed", "stopped"
OWN_OF_PLAN = ("seed", "output_dir", "resume")  # set for each run by the plan
BUDGET = ("steps", "epochs")
VARIANT_NAME = re.compile(r"\w[\w.-]*")
CAUSE = re.compile(rf"ERROR {re.escape(stage_1.log.name)}: (.*)")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared: a base, what all variants share, what each changes, and the seeds."""

    recipe: tuple[str, ...] = setting(help="YAML file of the base recipe; a further one lies over it")
    shared: dict[str, Any] = setting(help="settings that lie over the base, of all variants: data, and steps or epochs")
    variants: dict[str, dict[str, Any] | None] = setting(
        help="name -> settings that lie over the shared ones, as in a recipe, or dotted (phases.0.steps); `recipe` "
        "names another base"
    )
    seeds: tuple[int, ...] = setting((100,), "each variant is trained once with each")
    output_dir: str = setting(help="folder of the runs: VARIANT/seed_100")

    def __post_init__(self) -> None:
        wrong = [name for name in self.variants if not VARIANT_NAME.fullmatch(name)]
        if wrong:
            raise ValueError(f"variants: {wrong[0]!r} is no name of a folder; use letters, digits, '_', '-' and '.'.")
        for name, values in (("seeds", self.seeds), ("variants", self.variants)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: {list(values)} is not usable; give at least one, each once.")
        if not any(name in self.shared for name in BUDGET):
            raise ValueError("The plan states no budget of training: give shared.steps or shared.epochs.")


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """Which plan is trained, and how much of it."""

    plan: str = setting(help="YAML file of the plan (docs/training.md)", positional=True)
    only: tuple[str, ...] = setting((), "variants to train now (default: all of the plan)")
    seeds: tuple[int, ...] = setting((), "seeds to train now (default: all of the plan)")
    shared: dict[str, Any] = setting({}, "lies over the plan's shared settings, as --shared.data.path FOLDER")
    output_dir: str | None = setting(None, "folder of the runs (default: the plan's)")


@dataclass(frozen=True)
class Run:
    """One training of a plan. weights: how many the detector has."""

    variant: str
    recipe: Recipe
    weights: int

    @property
    def folder(self) -> Path:
        """Give where everything of it lies."""
        return Path(self.recipe.output_dir)

    @property
    def name(self) -> str:
        """Name it as its folder is named below that of the plan."""
        return f"{self.variant}/{self.folder.name}"

    def row(self) -> Row:
        """Give what is known of it: state, reason, minutes; of a finished one also its steps and its AUC on test."""
        known = _read(self.folder / OUTCOME) or {"state": WAITING, "reason": "", "minutes": 0.0}
        row = {"variant": self.variant, "seed": self.recipe.seed, "weights": self.weights, **known}
        numbers = _read(self.folder / stage_1.RESULTS)
        if numbers is None:
            return row
        test = {level: numbers["test"][level]["auc"] for level in ("frame", "video")} if "test" in numbers else {}
        minutes = known["minutes"] or numbers["minutes"]
        done = {"state": FINISHED, "reason": "", "minutes": minutes, "steps": steps_of(self.folder), "test_auc": test}
        return row | done


def ablate(config: AblateConfig) -> Iterator[str]:
    """Train the runs of a plan that are not finished, one after another; yields a line for each, then a table.

    Raises ValueError or FileNotFoundError before the first run for a mistake in the plan, and Incomplete at the end
    when a run has collapsed or failed.
    """
    plan = read_plan(config)
    variants = _chosen("only", config.only, [*plan.variants])
    seeds = _chosen("seeds", config.seeds, plan.seeds)
    runs = runs_of(plan)
    return _trained(plan, runs, [run for run in runs if run.variant in variants and run.recipe.seed in seeds])


def read_plan(config: AblateConfig) -> Plan:
    """Read a plan, with what the command line lays over it. Raises ValueError or FileNotFoundError."""
    over = {"shared": config.shared} | ({} if config.output_dir is None else {"output_dir": config.output_dir})
    try:
        return build(Plan, merge(load_yaml(config.plan), over))
    except ValueError as error:
        raise ValueError(f"{config.plan}: {error}") from error


def runs_of(plan: Plan) -> list[Run]:
    """Give every run of a plan, variant by variant.

    Raises ValueError or FileNotFoundError, naming the variant, for settings, a detector or data that do not work, and
    for a run that was begun with other settings.
    """
    runs, opened = [], set[str]()
    for name, changes in plan.variants.items():
        try:
            recipe = recipe_of(plan, changes or {})
            weights = count_weights(recipe)
            for phase in recipe.phase_list():
                _open_once(phase, opened)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"variants.{name}: {error}") from error
        _tell_budget(name, plan, recipe)
        for seed in plan.seeds:
            folder = Path(plan.output_dir) / name / f"seed_{seed}"
            runs.append(Run(name, replace(recipe, seed=seed, output_dir=str(folder)), weights))
    for run in runs:
        refuse_other_settings(run)
    return runs


def recipe_of(plan: Plan, changes: Mapping[str, Any]) -> Recipe:
    """Give the recipe of a variant: base, shared settings, its own. Raises ValueError or FileNotFoundError."""
    own = dict(changes)
    named = own.pop("recipe", None)
    bases = plan.recipe if named is None else [named] if isinstance(named, str) else named
    values = reduce(merge, map(load_yaml, bases), dict[str, Any]())
    for layer in (plan.shared, own):
        nested = {key: value for key, value in layer.items() if "." not in key}
        values = deepcopy(merge(values, nested))
        for path in (key for key in layer if "." in key):
            assign(values, path, layer[path])
        fixed = sorted(set(OWN_OF_PLAN) & layer.keys())
        if fixed:
            raise ValueError(f"{fixed[0]!r} is set by the plan for each run; give the plan `seeds` and `output_dir`.")
    recipe = build(Recipe, values)
    recipe.require_data()
    if any("seed" in phase for phase in recipe.phases):
        raise ValueError("A phase has a seed of its own, so that runs would not differ in it; take it out of `phases`.")
    return recipe


def count_weights(recipe: Recipe) -> int:
    """Count the weights of a recipe's detector, which is built without any. Raises ValueError when it cannot be."""
    with shapes_only():
        return sum(weight.numel() for weight in create(recipe.detector, recipe.model).parameters())


def _open_once(phase: PhaseConfig, opened: set[str]) -> None:
    """Open the data of a phase, as its training will, unless that was done before."""
    key = json.dumps(
        to_dict(replace(PhaseConfig(), **{n: getattr(phase, n) for n in ("kind", "fold", "data", "forge")}))
    )
    if key not in opened:
        open_phase(phase)
        opened.add(key)


def _tell_budget(name: str, plan: Plan, recipe: Recipe) -> None:
    """Warn of phases that train longer or shorter than the plan says for all."""
    stated = build(PhaseConfig, {key: plan.shared[key] for key in BUDGET if key in plan.shared})
    for phase in recipe.phase_list():
        if phase.kind == "train" and _budget(phase) != _budget(stated):
            told = (name, phase.name, _budget(phase), _budget(stated))
            log.warning("variant %r, phase %r: trains %s by settings of its own, the plan says %s", *told)


def _budget(phase: PhaseConfig) -> str:
    return f"{phase.steps} steps" if phase.steps else f"{phase.epochs} epochs"


def refuse_other_settings(run: Run) -> None:
    """Raise ValueError when a run was begun with other settings than those of the plan, and name them."""
    begun = (_read(run.folder / "run.json") or {}).get("config", {})
    compared = to_dict(run.recipe).keys() - set(stage_1.FREE_TO_CHANGE)
    old, new = ({key: config[key] for key in compared & config.keys()} for config in (begun, to_dict(run.recipe)))
    if begun and (changed := list(differences(old, new))):
        raise ValueError(
            f"{run.name} was begun with other settings than the plan now has: {'; '.join(changed)}. Give the plan "
            f"another output_dir or the variant another name, or delete {str(run.folder)!r}."
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Yield `path: old -> new` for every setting in which nested settings differ."""
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{where}{key}.")
        elif before != after:
            yield f"{where}{key}: {before!r} -> {after!r}"


def train_apart(run: Run) -> None:
    """Train a run in a process of its own, whose output goes into its log, and write down how that ended.

    Raises ValueError when another process is at it.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(run.folder / RECIPE) as staged:
        staged.write_text(yaml.safe_dump(to_dict(run.recipe), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "llava.train.stage_1", "--config", str(run.folder / RECIPE)]
    path, before, began = run.folder / LOG, run.row()["minutes"], time.monotonic()
    state, reason = STOPPED, "the next call goes on with it"
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the training holds it too, and outlives a killed parent
        except BlockingIOError:
            raise ValueError(f"{run.name} is being trained by another process; wait for its end.") from None
        start = file.tell()
        log.info("%s is being trained; its log is %s", run.name, path)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, process_group=0)
        try:
            code = process.wait()
            state, reason = ending(path.read_bytes()[start:].decode(errors="replace"), code)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # with its workers, which hold the log, too
                process.wait()
            minutes = round(before + (time.monotonic() - began) / 60, 2)
            write_json(run.folder / OUTCOME, {"state": state, "reason": reason, "minutes": minutes})


def ending(said: str, code: int) -> tuple[str, str]:
    """Give how a training ended, and why, by its log and its exit code."""
    if code == 0:
        return FINISHED, ""
    causes = CAUSE.findall(said)
    if causes:
        return COLLAPSED if code == 1 else FAILED, causes[-1]
    if code < 0:
        return FAILED, f"ended by {signal.Signals(-code).name}; SIGKILL may mean that memory ran out"
    return FAILED, (said.strip() or f"exit code {code}").splitlines()[-1]


def steps_of(folder: Path) -> int:
    """Count the steps of all phases of a finished run that train."""
    histories = (json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"phases/*/{HISTORY}"))
    return sum(max(row["step"] for row in history) for history in histories)


def table_text(runs: Sequence[Run]) -> str:
    """Give a table of all runs of a plan, and below it why some gave no detector."""
    heads = ("variant", "seed", "state", "test AUC, frames", "videos", "steps", "minutes", "weights")
    table = titled_table("Runs; 95 % intervals by group bootstrap", *heads)
    rows = [run.row() for run in runs]
    for row in rows:
        aucs = (interval_text(row["test_auc"][level]) if row.get("test_auc") else "-" for level in ("frame", "video"))
        steps = str(row.get("steps", "-"))
        table.add_row(
            row["variant"], str(row["seed"]), row["state"], *aucs, steps, f"{row['minutes']:.1f}", f"{row['weights']:,}"
        )
    why = [f"{run.name} {row['state']}: {row['reason']}" for run, row in zip(runs, rows, strict=True) if row["reason"]]
    return text_of(table) + "".join(f"{line}\n" for line in why)


def _trained(plan: Plan, runs: Sequence[Run], chosen: Sequence[Run]) -> Iterator[str]:
    output = Path(plan.output_dir)
    write_run(output, to_dict(plan), None)
    try:
        with _interruptible():
            for number, run in enumerate(chosen, 1):
                if run.row()["state"] not in (FINISHED, COLLAPSED):
                    train_apart(run)
                write_json(output / TABLE, [each.row() for each in runs])
                yield f"[{number}/{len(chosen)}] {run.name}: {_line(run.row())}\n"
    except KeyboardInterrupt:
        write_json(output / TABLE, [each.row() for each in runs])
        yield table_text(runs)
        raise
    yield table_text(runs)
    wrong = [run.name for run in chosen if run.row()["state"] != FINISHED]
    if wrong:
        raise Incomplete(f"{len(wrong)} of {len(chosen)} runs gave no detector: {', '.join(wrong)}.")


def _line(row: Row) -> str:
    auc = f", test AUC {interval_text(row['test_auc']['frame'])}" if row.get("test_auc") else ""
    return f"{row['state']}{auc}, {row['minutes']:.1f} minutes"


def _chosen(flag: str, asked: Sequence[Any], known: Sequence[Any]) -> Sequence[Any]:
    """Give what was asked for, all that is known without. Raises ValueError for what is not in the plan."""
    wrong = [str(each) for each in asked if each not in known]
    if wrong:
        raise ValueError(f"--{flag}: {wrong[0]!r} is not in the plan. {nearest(wrong[0], map(str, known))}")
    return asked or known


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM, which schedulers send, do what Ctrl+C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _read(path: Path) -> Any:
    """Read a JSON file, None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
