"""Published detector files: which layout one has, told by its tensors' names, and how it becomes a folder of ours."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from llava.core.registry import Registry
from llava.core.runtime import atomic_path, write_json
from llava.core.tensor_files import PICKLED, REPORT_NAME, Plan, Rules, Shape, TensorFiles, plan, write_shards
from llava.core.weights import CONFIG_NAME, checkpoints_dir, resolve, shapes_only
from llava.detectors.base import Detector

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Unseen:
    """What tensors do not show, said by hand; None = as in the weights that were published.

    vision_tower: file of the CLIP vision tower. clip: a CLIP config.json. heads: attention heads of a transformer.
    iterations, branches: of RADAR, its rounds of reasoning and what it looks at.
    """

    vision_tower: Path | None = None
    clip: Mapping[str, Any] | None = None
    heads: int | None = None
    iterations: int | None = None
    branches: Literal["both", "boundary", "frequency"] | None = None


class PublishedFile:
    """A published detector file: its plan, and how to write it in our layout.

    A subclass sets `detector` and `marks`, tensors by which its files are known, and finds config and plan itself.
    """

    detector: ClassVar[type[Detector]]
    marks: ClassVar[tuple[str, ...]]

    def __init__(self, file: Path, tensors: TensorFiles, config: Any, found: Plan) -> None:
        self.file, self.tensors, self.config, self.plan = file, tensors, config, found

    @classmethod
    def open(cls, file: Path, unseen: Unseen) -> Self:
        """Open a file of this layout. Raises ValueError or FileNotFoundError."""
        raise NotImplementedError

    @classmethod
    def files_of(cls, file: Path) -> list[Path]:
        """List the files that are read when `file` is opened."""
        return [file]

    @property
    def remark(self) -> str:
        """Say what its user should know of the result; empty = nothing."""
        return ""

    def computed(self) -> dict[str, Tensor]:
        """Give the tensors of ours that are made of several published ones."""
        return {}

    def write(self, folder: Path) -> None:
        """Write config.json, model.safetensors and conversion.json. Raises ValueError when tensors do not fit."""
        self.plan.check(str(self.file))
        with shapes_only():
            described = self.detector(self.config).describe()
        with atomic_path(folder) as staged:
            write_shards(staged, self.plan.moves, self.tensors, self.computed(), shard_bytes=float("inf"))
            write_json(staged / CONFIG_NAME, described)
            report = self.plan.to_dict() | {"from": self.file.name, "left": sorted(self.tensors.besides)}
            write_json(staged / REPORT_NAME, report)


LAYOUTS: Registry[type[PublishedFile]] = Registry(
    "published layout",
    {
        "m2f2det": "llava.detectors.m2f2det_published:PublishedDetector",
        "vit3": "llava.detectors.vit3:PublishedViT3",
        "radar": "llava.detectors.radar_published:PublishedRadar",
    },
)


def detector_tensors(file: Path) -> TensorFiles:
    """Open the tensors of a detector file, wrapped or not, without what DataParallel and torch.compile put before."""
    return TensorFiles([file], lambda name: name.removeprefix("module.").removeprefix("_orig_mod."))


def plan_for(
    detector: type[Detector], config: Any, shapes: Mapping[str, Shape], rules: Rules, computed: Sequence[str] = ()
) -> Plan:
    """Plan how published tensors become those of our detector with these settings."""
    with shapes_only():
        state = detector(config).state_dict()
    return plan(shapes, {name: tuple(tensor.shape) for name, tensor in state.items()}, rules, computed)


def layout_of(file: Path) -> type[PublishedFile]:
    """Find the layout that holds tensors named as in a file. Raises ValueError when there is none."""
    names = detector_tensors(file)
    for name in LAYOUTS:
        layout = LAYOUTS.get(name)
        if all(mark in names for mark in layout.marks):
            return layout
    raise ValueError(
        f"{str(file)!r} holds {len(names)} tensors ({next(iter(names))}, ...), those of no published detector known "
        f"here; known are files of {', '.join(LAYOUTS)}."
    )


def ready_detector(name: str | Path) -> Path:
    """Give the folder of a detector that `load` reads: as `resolve`, and a published file is converted first.

    A folder without config.json stands for the one published file in it. The converted copy is kept in
    `checkpoints/converted/`. Raises FileNotFoundError or ValueError.
    """
    file = Path(name)
    if not (file.is_file() and file.suffix in PICKLED):
        folder = resolve(name)
        inside = _published_in(folder)
        if inside is None:
            return folder
        file = inside
    layout = layout_of(file)
    folder = converted_folder(file, layout.files_of(file))
    if not folder.is_dir():
        published = layout.open(file, Unseen())
        published.write(folder)
        log.info("%s is a published detector: %s; written to %s", file, published.plan.counts(), folder)
        if published.remark:
            log.warning(published.remark)
    return folder


def _published_in(folder: Path) -> Path | None:
    """Find the published detector file in a folder that is not of ours. Raises ValueError when there are several."""
    if (folder / CONFIG_NAME).is_file():
        return None
    found = [file for file in sorted(folder.glob("*.pth")) if _is_published(file)]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{str(folder)!r} holds several published detectors ({names}); name one of these files.")
    return found[0] if found else None


def _is_published(file: Path) -> bool:
    try:
        layout_of(file)
    except ValueError:  # of another kind, damaged or unsafe; named itself, it says so
        return False
    return True


def converted_folder(origin: Path, files: Sequence[Path]) -> Path:
    """Give where the converted copy of some files belongs; another file, size or time is another folder."""
    seen = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr(seen).encode()).hexdigest()[:8]
    place = origin.resolve()
    if place.parent.name == "snapshots":  # of the hub's cache: models--owner--name/snapshots/commit
        place = place.parents[1]
    return checkpoints_dir() / "converted" / f"{place.stem if place.is_file() else place.name}-{digest}"
