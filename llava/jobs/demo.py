"""`m2f2 demo`: the whole path, small, in one process: data, three stages, questions, scores."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llava.core.config import build, load_yaml, setting
from llava.core.runtime import item_rng, write_json
from llava.core.weights import checkpoints_dir
from llava.data.ddvqa import DdvqaConfig, build_ddvqa
from llava.data.sources import DataConfig
from llava.data.verdicts import VerdictConfig, build_verdicts
from llava.evaluation.blind import read_training
from llava.evaluation.captions import read_caption_set, score_captions
from llava.evaluation.integrity import integrity_report, read_prompts
from llava.evaluation.judgement import judgement_report, read_agreement, read_judgements
from llava.jobs import ddvqa_answers
from llava.jobs.forged_faces import ForgeDataConfig, build_forgeries
from llava.jobs.forged_files import TABLE, join_tables, write_image
from llava.ops.augment import dead_leaves
from llava.pipeline.settings import DEMO_MODEL
from llava.train import evaluate, stage_1, stages
from llava.train.tiny_base import TinyBaseConfig, make_tiny_base

log = logging.getLogger(__name__)


class Clock:
    """Says which step begins when, and remembers how long each took, in seconds."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}

    def run(self, title: str, work: Callable[[], Any]) -> Any:
        """Do one step and give its result. Raises ValueError when that is an exit code other than 0."""
        begun = time.monotonic()
        log.info("== %s (%.0f s)", title, begun - self.started)
        result = work()
        if isinstance(result, int) and result:
            raise ValueError(f"The step {title!r} ended with {result}; its message stands above.")
        self.seconds[title] = round(time.monotonic() - begun, 1)
        return result


def train(plan: Plan, out: Path, explainer: Path, clock: Clock) -> None:
    """Train the detector, the tiny base, the adapter and LoRA, by what the stage scripts call."""
    images = ["--image_folder", str(plan.images)]
    clock.run("stage 1: the detector", lambda: stage_1.main(["--output_dir", str(out / "stage_1"), *plan.stage_1]))
    scored = evaluate.ScoreConfig(model=str(out / "stage_1"), output_dir=str(out / "scores"))
    clock.run("stage 1: scores on test", lambda: evaluate.score_split(scored))
    base = {"image_folder": str(plan.images), "detector": str(out / "stage_1"), "out": str(out / "base"), **plan.base}
    clock.run("the tiny LLaVA base", lambda: make_tiny_base(build(TinyBaseConfig, base)))
    second = {
        "config": CONFIGS / "stage_2" / "m2f2_tiny.yaml",
        "merge.base": out / "base" / "model",
        "merge.detector": out / "stage_1",
        "merge.start": out / "stage_2-start",
        "output_dir": out / "stage_2-delta",
    }
    clock.run("stage 2: the adapter", lambda: stages.main(["2", *flags(second), *images, *plan.stage_2]))
    third = {
        "config": CONFIGS / "stage_3" / "m2f2_tiny.yaml",
        "merge.base_of_delta": out / "stage_2-start",
        "merge.delta": out / "stage_2-delta",
        "merge.start": out / "stage_2",
        "merge.final": explainer,
        "output_dir": out / "stage_3-delta",
    }
    clock.run("stage 3: LoRA", lambda: stages.main(["3", *flags(third), *images, *plan.stage_3]))


def answer(plan: Plan, out: Path, explainer: Path, clock: Clock) -> None:
    """Ask the explainer about the test images: the verdict, and the reasons where the data have them."""
    asked = {"det": "verdict_only.json", "exp": "label_free.jsonl"}
    for task, file in asked.items():
        if task == "det" or plan.reasons:
            settings = {
                "model_path": explainer,
                "images": plan.images,
                "questions": plan.conversations / "test" / file,
                "output": out / f"{task}.jsonl",
            }
            clock.run(f"answers: {task}", partial(ddvqa_answers.main, [task, *flags(settings)]))


def judge_answers(plan: Plan, out: Path) -> None:
    """Write judgement.json and, where there are reasons, explanation.json and integrity.json."""
    answers = read_judgements(out / "det.jsonl", plan.conversations / "test" / "verdict_only.json")
    write_json(out / "judgement.json", {**judgement_report(answers), "agreement": read_agreement(out / "det.jsonl")})
    if plan.reasons:
        captions = read_caption_set(out / "exp.jsonl", plan.conversations / "test" / "label_free.jsonl")
        write_json(out / "explanation.json", score_captions(captions))
        training = read_training(plan.conversations / "train" / "label_free.json")
        write_json(out / "integrity.json", integrity_report(captions, training, read_prompts(out / "exp.jsonl")))


def flags(settings: dict[str, Any]) -> list[str]:
    """Write settings as a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


CONFIGS = Path("scripts/configs")
ANNOTATIONS = "annotations/DQ_FFpp"
LEAVES = "leaves"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which files each step reads; flags are those of the commands.

    images: folder that image names start from. conversations: folder with {train,test}. reasons: whether there are
    questions about reasons. base: settings of the tiny base.
    """

    images: Path
    conversations: Path
    reasons: bool
    stage_1: list[str]
    base: dict[str, Any]
    stage_2: list[str]
    stage_3: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class LeavesConfig:
    """Random pictures without a face (dead leaves) that stage 1 learns traces from as well."""

    count: int = setting(0, "pictures; 0 = none")
    versions: int = setting(1, "versions of each; forgeries of each version as in data")


@dataclass(frozen=True, kw_only=True)
class DemoRecipe:
    """What is forged from the embedded photos, and what differs from the tiny recipes."""

    data: ForgeDataConfig = setting(help="what is forged, as in m2f2 data forge; output is set by the demonstration")
    leaves: LeavesConfig = setting(LeavesConfig())
    stage_1: dict[str, Any] = setting({}, "flags of stage 1")
    base: dict[str, Any] = setting({}, "settings of the tiny base")
    stage_2: dict[str, Any] = setting({}, "flags of stage 2")
    stage_3: dict[str, Any] = setting({}, "flags of stage 3")


def prepare(folder: str | None, recipe: str, out: Path) -> Plan:
    """Make the conversations, from forged photos if no folder is given, and say what each step reads."""
    if folder is None:
        return _embedded(build(DemoRecipe, load_yaml(recipe), where=recipe), out)
    data = Path(folder)
    if not data.is_dir():
        raise FileNotFoundError(f"Folder {folder!r} does not exist; give DD-VQA or class folders, or no folder at all.")
    return _ddvqa(data, out) if (data / ANNOTATIONS).is_dir() else _class_folders(data, out)


def _embedded(recipe: DemoRecipe, out: Path) -> Plan:
    """Forge the embedded photos; everything about this demonstration stands in its recipe."""
    data = out / "data"
    build_forgeries(replace(recipe.data, output=str(data)))
    folders = [data, *([_forged_leaves(recipe, out / LEAVES)] if recipe.leaves.count else [])]
    join_tables(folders, out / TABLE)
    train = data / "train"
    table = ["--data.source", "csv", "--data.path", str(out / TABLE), "--data.masks", "true"]
    return Plan(
        images=data / "images",
        conversations=data,
        reasons=True,
        stage_1=[*_recipe("stage_1/m2f2_tiny_grounded.yaml"), *table, *_flags(recipe.stage_1)],
        base={"data": [str(train / "label_free.json"), str(train / "dialogue.json")], **recipe.base},
        stage_2=["--data_path", str(train / "label_free.json"), *_flags(recipe.stage_2)],
        stage_3=["--data_path", str(train / "dialogue.json"), *_flags(recipe.stage_3)],
    )


def _forged_leaves(recipe: DemoRecipe, folder: Path) -> Path:
    """Draw pictures of dead leaves, all for training, and forge them like faces; gives the folder of the forgeries."""
    config = recipe.data
    for number in range(recipe.leaves.count):
        picture = dead_leaves(config.longest_side, item_rng(config.seed, 0, number))
        write_image(folder / "pictures" / f"{number:04d}.png", picture, config.jpeg_quality)
    forged = replace(
        config,
        folder=str(folder / "pictures"),
        output=str(folder / "data"),
        face="off",
        versions=recipe.leaves.versions,
        test_groups=(),
        val_groups=(),
        test_fraction=0.0,
        val_fraction=0.0,
    )
    build_forgeries(forged)
    return folder / "data"


def _ddvqa(data: Path, out: Path) -> Plan:
    images, conversations = data / "images" / "c40", out / "conversations"
    held_out = data / "splits" / "heldval_300.txt"
    settings = DdvqaConfig(
        annotations=str(data / ANNOTATIONS),
        images=str(images),
        output=str(conversations),
        val_list=str(held_out) if held_out.is_file() else None,
    )
    build_ddvqa(settings)
    return _labelled(images, conversations, "dialogue")


def _class_folders(data: Path, out: Path) -> Plan:
    build_verdicts(VerdictConfig(data=DataConfig(path=str(data)), output=str(out / "conversations")))
    return _labelled(data, out / "conversations", "verdict_only")


def _labelled(images: Path, conversations: Path, style: str) -> Plan:
    train = conversations / "train"
    verdicts, talks = str(train / "verdict_only.json"), str(train / f"{style}.json")
    source = ["--data.source", "conversations", "--data.path", str(conversations), "--data.root", str(images)]
    return Plan(
        images=images,
        conversations=conversations,
        reasons=style == "dialogue",
        stage_1=[*_recipe("stage_1/m2f2_tiny.yaml"), *source],
        base={"data": sorted({verdicts, talks})},
        stage_2=["--data_path", verdicts],
        stage_3=["--data_path", talks],
    )


def _recipe(name: str) -> list[str]:
    return ["--config", str(CONFIGS / name)]


def _flags(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demonstration learns from, and where it writes."""

    data: str | None = setting(
        None,
        "folder of your own: DD-VQA (annotations/DQ_FFpp, images/c40) or class folders {train,val,test}/{real,fake}; "
        "none = forgeries of the four embedded photos",
    )
    output: str = setting("outputs/demo", "folder of everything that is made on the way")
    model: str | None = setting(
        None, "name of the finished explainer in checkpoints/; none = demo, or demo-FOLDER for data of one's own"
    )
    recipe: str = setting(
        "scripts/configs/demo.yaml", "what is forged and how long is trained, without data of one's own"
    )

    @property
    def explainer(self) -> Path:
        """Give the folder of the finished explainer."""
        own = DEMO_MODEL if self.data is None else f"{DEMO_MODEL}-{Path(self.data).resolve().name}"
        return checkpoints_dir() / (self.model or own)


def run_demo(config: DemoConfig) -> Iterator[str]:
    """Run the whole path; yields the scores and where everything is.

    Raises ValueError where a step fails, and where another run writes to the same folder.
    """
    out = Path(config.output)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            yield from _run(config, out)
    except Timeout:
        raise ValueError(f"output: another run writes to {str(out)!r} now; wait for it, or give --output.") from None


def _run(config: DemoConfig, out: Path) -> Iterator[str]:
    # here, so that --help does not wait for the libraries that train
    from llava.core.runtime import write_json
    from llava.evaluation.tables import comparison, text_of
    from llava.jobs.demo_report import write_report

    clock, explainer = Clock(), config.explainer
    plan = clock.run("data", lambda: prepare(config.data, config.recipe, out))
    train(plan, out, explainer, clock)
    answer(plan, out, explainer, clock)
    clock.run("scores", lambda: judge_answers(plan, out))
    if config.data is None:
        clock.run("report", lambda: write_report(out, explainer, clock.seconds))
        yield f"The report is {out / 'report.html'}: open it in a browser. This model is a demonstration and no tool.\n"
    write_json(out / "seconds.json", clock.seconds)
    yield text_of(comparison([out]))
    minutes = sum(clock.seconds.values()) / 60
    yield f"All of it took {minutes:.1f} minutes. Ask it: m2f2 chat IMAGE --model {explainer}\n"
