"""What the demonstration learns from: the embedded photos and their forgeries, or a folder of one's own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llava.core.config import build, load_yaml, setting
from llava.core.runtime import item_rng
from llava.data.ddvqa import DdvqaConfig, build_ddvqa
from llava.data.sources import DataConfig
from llava.data.verdicts import VerdictConfig, build_verdicts
from llava.ops.dead_leaves import dead_leaves
from llava.pipeline.forge import ForgeDataConfig, build_forgeries
from llava.pipeline.forge_files import TABLE, join_tables, write_image

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
