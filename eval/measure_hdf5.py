"""How fast are frames read from HDF5? The published access pattern and ours, same machine, same run, medians.

Published pattern, as its training item is described: the handles are opened once, before the workers start; an item
reads the whole clip, keeps one frame of it and builds the augmentations anew; CLIP's resize to 336 pixels is done in
the main process, picture by picture. Ours: only the frame is read, in a worker that has its own handles and does all.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from llava.core.config import parse, setting
from llava.core.runtime import item_rng, write_json
from llava.core.terminal import console, titled_table
from llava.core.types import InputSpec, Record
from llava.data.clips import Hdf5Source
from llava.data.dataset import DetectionDataset, collate, to_tensor
from llava.data.hdf5_pack import PackConfig, pack
from llava.data.images import list_images, read_image
from llava.data.public_sets import Kind, file_name, keys_of
from llava.data.sources import DataConfig, split_of
from llava.detectors.m2f2det_parts import CLIP_MEAN, CLIP_STD
from llava.evaluation.tables import run_script
from llava.ops.degrade import DegradeConfig

MEASURED_KINDS: tuple[Kind, ...] = ("original", "Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")
CLIP_INPUT = InputSpec(size=336, mean=CLIP_MEAN, std=CLIP_STD)
LAYOUTS = {"published": "whole clips", "raw": "chunks of one frame", "jpeg": "a JPEG per frame"}
WHOLE_CLIPS = "published pattern, whole clips"
BATCH = 10
MEMORY_COLUMNS = ("layout", "first batch", "2nd tenth", "6th tenth", "last tenth")
Reader = Callable[[int], int]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured and on what."""

    faces: str = setting(help="folder of face crops that the clips are made of")
    folder: str = setting(help="folder for the set (about 0.4 MB per frame); it is made where it is missing")
    pairs: int = setting(6, "pairs of ids; each makes ten clips, two of each of five kinds")
    frames: int = setting(300, "frames of a clip")
    side: int = setting(224, "pixels a side")
    repeats: int = setting(5, "times everything is measured, in alternating order")
    draws: int = setting(10, "our items per clip and repeat; the published pattern reads one per clip")
    workers: int = setting(2, "processes that prepare images, end to end")
    scored: int = setting(100, "frames of each clip in the epoch over which memory is looked at")
    json: str | None = setting(None, "write the numbers to this file as well")


def main() -> None:
    """Make the set, measure, print the tables."""
    settings = parse(Settings, description=(__doc__ or "").splitlines()[0])
    folder = Path(settings.folder)
    if not (folder / "complete").is_file():
        make_set(settings, folder)
    through_workers = f"end to end, {CLIP_INPUT.size} px, {settings.workers} workers"
    rates = {
        "I/O alone, one process": measure(settings.repeats, folder, readers(settings, folder, None)),
        through_workers: measure(settings.repeats, folder, readers(settings, folder, settings.workers)),
    }
    costs, memory = item_costs(settings, folder), worker_memory(settings, folder)
    print_tables(rates, costs, memory, settings.workers)
    if settings.json:
        write_json(settings.json, {"images_per_second": rates, "ms_per_item": costs, "worker_mb": memory})


def make_set(settings: Settings, folder: Path) -> None:
    """Write the same clips in three layouts; a frame is a window that wanders over one face crop."""
    pairs = [(f"{2 * i:03}", f"{2 * i + 1:03}") for i in range(settings.pairs)]
    crops = list_images(settings.faces)
    if not crops:
        raise ValueError(f"faces: {settings.faces!r} holds no pictures; give a folder of face crops.")
    for name, train, test in (("training", pairs, []), ("scoring", [], pairs)):
        for split, part in (("train", train), ("val", []), ("test", test)):
            write_json(folder / name / f"{split}.json", part)
    (folder / "published").mkdir(exist_ok=True)
    for number, kind in enumerate(MEASURED_KINDS):
        pictures = folder / "pictures"
        for i, key in enumerate(keys_of(kind, pairs)):
            write_clip(pictures / key, read_image(crops[(100 * number + i) % len(crops)]), settings)
        for form in ("raw", "jpeg"):
            pack(PackConfig(folder=str(pictures), output=str(folder / form), kind=kind, form=form))
        with (
            h5py.File(folder / "raw" / file_name(kind, "c40")) as source,
            h5py.File(folder / "published" / file_name(kind, "c40"), "w") as target,
        ):
            for key, clip in source.items():
                target.create_dataset(key, data=clip[...])
        shutil.rmtree(pictures)
    (folder / "complete").touch()


def write_clip(folder: Path, crop: np.ndarray, settings: Settings) -> None:
    """Write the frames of one clip as JPEG files."""
    folder.mkdir(parents=True)
    room = settings.side + settings.side // 8
    picture = np.array(Image.fromarray(crop).resize((room, room), Image.Resampling.LANCZOS))
    for n in range(settings.frames):
        top, left = (int((room - settings.side) * (1 + wave(n / 40)) / 2) for wave in (np.sin, np.cos))
        frame = picture[top : top + settings.side, left : left + settings.side]
        Image.fromarray(frame).save(folder / f"{n:04}.jpg", quality=95)


def source_of(folder: Path, layout: str, splits: str = "training", frames: int = 1) -> Hdf5Source:
    """Open one layout of the set."""
    config = DataConfig(source="hdf5", path=str(folder / layout), splits=str(folder / splits), frames=frames)
    return Hdf5Source(config)


class WholeClips(Dataset[torch.Tensor]):
    """The published training item: whole clip read, one frame kept, augmentations built, pixels in [0, 1]."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.places = [record.where.rsplit("::", 2)[:2] for record in records]
        self.files = {path: h5py.File(path, "r") for path in dict.fromkeys(path for path, _ in self.places)}
        self.repeat = 0

    def __len__(self) -> int:
        return len(self.places)

    def frame(self, index: int) -> np.ndarray:
        """Read the whole clip for one of its frames."""
        path, key = self.places[index]
        clip = self.files[path][key][...]
        return clip[int(item_rng(0, self.repeat, index).integers(len(clip)))]

    def __getitem__(self, index: int) -> torch.Tensor:
        augment = DegradeConfig()
        image, _ = augment(self.frame(index), None, item_rng(1, self.repeat, index))
        return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255


def read_whole(published: WholeClips, repeat: int) -> int:
    """Read one frame of each clip by reading the clip."""
    published.repeat = repeat
    for index in range(len(published)):
        published.frame(index)
    return len(published)


def read_frames(source: Hdf5Source, draws: int, repeat: int) -> int:
    """Read `draws` frames of each clip."""
    items = drawn(draws, repeat, len(source.records))
    return len([source.load(source.records[index], item_rng(0, epoch, index)) for epoch, index in items])


def load_whole(published: WholeClips, workers: int, repeat: int) -> int:
    """Take one frame of each clip through the workers and give it CLIP's size in the main process."""
    published.repeat, count = repeat, 0
    for batch in DataLoader(published, BATCH, num_workers=workers):
        pictures = (batch * 255).round().byte().permute(0, 2, 3, 1).numpy()
        count += len(torch.stack([to_tensor(picture, CLIP_INPUT) for picture in pictures]))
    return count


def load_frames(source: Hdf5Source, workers: int, draws: int, repeat: int) -> int:
    """Take `draws` frames of each clip through the workers, ready for the detector."""
    dataset = DetectionDataset(source, source.records, {"pixel_values": CLIP_INPUT}, DegradeConfig())
    items = drawn(draws, repeat, len(dataset))
    loader = DataLoader(dataset, BATCH, sampler=items, num_workers=workers, collate_fn=collate)
    return sum(len(batch["labels"]) for batch in loader)


def readers(settings: Settings, folder: Path, workers: int | None) -> dict[str, Reader]:
    """Give every way to read, by name: frames alone when workers is None, else a detector's input."""
    published = WholeClips(source_of(folder, "published").records)
    sources = {f"ours, {text}": source_of(folder, name) for name, text in LAYOUTS.items()}
    if workers is None:
        ours = {name: partial(read_frames, source, settings.draws) for name, source in sources.items()}
        return {WHOLE_CLIPS: partial(read_whole, published), **ours}
    ours = {name: partial(load_frames, source, workers, settings.draws) for name, source in sources.items()}
    return {WHOLE_CLIPS: partial(load_whole, published, workers), **ours}


def drawn(draws: int, repeat: int, count: int) -> list[tuple[int, int]]:
    """Give (epoch, index), every clip in each of `draws` epochs, in random order."""
    epochs = range(repeat * draws, (repeat + 1) * draws)
    return [(epoch, int(index)) for epoch in epochs for index in item_rng(2, epoch, 0).permutation(count)]


def measure(repeats: int, folder: Path, ways: Mapping[str, Reader]) -> dict[str, dict[str, float]]:
    """Give median images per second, from a dropped page cache (cold) and once everything was read before (warm)."""
    found: dict[str, dict[str, list[float]]] = {name: {"cold": [], "warm": []} for name in ways}
    for state in ("cold", "warm"):
        for repeat in range(repeats):
            # Alternating, so that neither always profits from what the other left behind.
            for name in list(ways)[:: 1 if repeat % 2 else -1]:
                (drop_cache if state == "cold" else fill_cache)(folder)
                start = time.perf_counter()
                count = ways[name](repeat)
                found[name][state].append(count / (time.perf_counter() - start))
    return {name: {state: median(rates) for state, rates in states.items()} for name, states in found.items()}


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget the files; what the disk or a host beneath it keeps is out of reach."""
    for path in folder.glob("*/*.h5"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill_cache(folder: Path) -> None:
    """Read all files once."""
    for path in folder.glob("*/*.h5"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def item_costs(settings: Settings, folder: Path) -> dict[str, float]:
    """Give milliseconds per item of each step, one process, warm: what bounds us end to end."""
    fill_cache(folder)
    sources = {name: source_of(folder, name) for name in LAYOUTS}
    records, augment = sources["raw"].records, DegradeConfig()
    image, items = sources["raw"].load(records[0]).image, drawn(settings.draws, 0, len(records))

    def read(source: Hdf5Source, epoch: int, index: int) -> None:
        source.load(source.records[index], item_rng(0, epoch, index))

    steps: dict[str, Callable[[int, int], Any]] = {
        **{f"read, {text}": partial(read, sources[name]) for name, text in LAYOUTS.items()},
        "augment": lambda epoch, index: augment(image, None, item_rng(1, epoch, index)),
        f"resize to {CLIP_INPUT.size} px and normalise": lambda epoch, index: to_tensor(image, CLIP_INPUT),
    }
    costs = {}
    for name, step in steps.items():
        start = time.perf_counter()
        for epoch, index in items:
            step(epoch, index)
        costs[name] = 1000 * (time.perf_counter() - start) / len(items)
    return costs


def worker_memory(settings: Settings, folder: Path) -> dict[str, list[float]]:
    """Give the memory of all workers in MB over an epoch of many frames: at the first batch, means of three tenths."""
    found = {}
    for layout in LAYOUTS:
        source = source_of(folder, layout, "scoring", settings.scored)
        dataset = DetectionDataset(source, split_of(source, "test"), {"pixel_values": CLIP_INPUT})
        loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=settings.workers, collate_fn=collate)
        samples = [sum(anonymous_mb(child.pid) for child in multiprocessing.active_children()) for _ in loader]
        tenths = [mean(samples[i * len(samples) // 10 : (i + 1) * len(samples) // 10]) for i in (1, 5, 9)]
        found[layout] = [samples[0], *tenths]
    return found


def anonymous_mb(pid: int | None) -> float:
    """Give the resident memory of a process that is no file's, in MB; the part it was forked with is counted."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def print_tables(
    rates: Mapping[str, Mapping[str, Mapping[str, float]]],
    costs: Mapping[str, float],
    memory: Mapping[str, Sequence[float]],
    workers: int,
) -> None:
    """Print what was measured."""
    out = console()
    for title, ways in rates.items():
        table = titled_table(title, "access", "images/s cold", "ratio", "images/s warm", "ratio")
        for name, found in ways.items():
            pairs = [(found[state], found[state] / ways[WHOLE_CLIPS][state]) for state in ("cold", "warm")]
            table.add_row(name, *(f"{number:.1f}" for pair in pairs for number in pair))
        out.print(table)
    table = titled_table("one item of ours, warm, one process", "step", "ms")
    for step, cost in costs.items():
        table.add_row(step, f"{cost:.2f}")
    out.print(table)
    table = titled_table(f"memory of all {workers} workers over one epoch, MB", *MEMORY_COLUMNS)
    for layout, samples in memory.items():
        table.add_row(LAYOUTS[layout], *(f"{sample:.1f}" for sample in samples))
    out.print(table)


if __name__ == "__main__":
    run_script(main)
