"""`m2f2 data forge`: a folder of real faces becomes labelled images whose truth is known, masks and conversations."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal, Protocol

import cv2
import numpy as np

from llava.core.config import setting, to_dict
from llava.core.registry import nearest
from llava.core.runtime import item_rng, write_run
from llava.core.terminal import progress
from llava.core.types import FAKE, LABEL_NAMES, REAL, REGIONS, Record
from llava.data.answer_texts import Truth
from llava.data.faces import FaceBox, face_square, find_faces, is_sure
from llava.data.images import IMAGE_SUFFIXES, UnreadableImage, list_images, read_image
from llava.data.inputs import NamedImage
from llava.data.sources import DataConfig
from llava.data.splits import choose_groups
from llava.data.stills import CsvSource
from llava.jobs.forged_files import (
    IMAGES,
    LEAVES,
    MASKS,
    SPLITS,
    SUFFIXES,
    Item,
    claim_folder,
    write_image,
    write_lists,
    write_mask,
)
from llava.ops.augment import AugmentConfig, augment, dead_leaves
from llava.ops.face_regions import disjoint, eyes_in_box, face_regions, usual_box
from llava.ops.forge import ForgeConfig, Forgery, draw_forgery
from llava.pipeline.crops import faces_of
from llava.pipeline.settings import FaceSettings

log = logging.getLogger(__name__)

UNREADABLE, NO_FACE, DOUBTFUL = "left_out_unreadable", "left_out_without_face", "left_out_doubtful_face"


class RegionFinder(Protocol):
    """Finds the regions of a face: the place where a landmark detector is plugged in."""

    def __call__(self, image: np.ndarray, box: FaceBox | None) -> Mapping[str, np.ndarray] | None:
        """Give masks float (H, W) in [0, 1] of the five regions and `face`; None when the image shows no face.

        image: uint8 RGB (H, W, 3); box: where the face was found in it, None when nobody looked.
        """


@dataclass(frozen=True, kw_only=True)
class FaceCrop:
    """A face, uint8 (H, W, 3), and the masks of its regions, which never overlap but for `face`."""

    image: np.ndarray
    regions: Mapping[str, np.ndarray]


def read_face(
    path: Path, face: Literal["auto", "off"], longest_side: int, find_regions: RegionFinder
) -> FaceCrop | str:
    """Read a photo and give its largest face, shrunk to `longest_side` pixels, or why it is left out.

    A face that had to be cut out must be one beyond doubt (`is_sure`); one that cannot be judged counts as doubtful. An
    image that is a face crop already is taken whole.
    """
    try:
        pixels = read_image(path)
    except UnreadableImage:
        return UNREADABLE
    box: FaceBox | None = None
    if face == "auto":
        settings = FaceSettings(face="largest")
        found = faces_of(NamedImage(name=path.name, pixels=pixels), settings)[0]
        if found.pixels is None or found.box is None:
            return NO_FACE if found.box is None else DOUBTFUL
        box = found.box
        if found.pixels is not pixels:
            if not is_sure(box):
                return DOUBTFUL
            left, top, _ = face_square(box, pixels.shape[0], pixels.shape[1], settings.margin)
            box = box.moved(-left, -top)
        pixels = found.pixels
    image, box = _shrunk(pixels, box, longest_side)
    return _crop(image, box, find_regions) or NO_FACE


def _crop(image: np.ndarray, box: FaceBox | None, find_regions: RegionFinder) -> FaceCrop | None:
    regions = find_regions(image, box)
    return None if regions is None else FaceCrop(image=image, regions=disjoint(regions, *image.shape[:2]))


def regions_by_eyes(image: np.ndarray, box: FaceBox | None) -> dict[str, np.ndarray]:
    """Place the regions by the landmarks' eyes, by the box without landmarks, by the usual crop without a face."""
    height, width = image.shape[:2]
    box = box or next(iter(find_faces(image)), None)
    if box is not None and box.eyes is not None:
        return face_regions(height, width, box.eyes)
    place = usual_box(height, width) if box is None else (box.x, box.y, box.width, box.height)
    return face_regions(height, width, eyes_in_box(*place))


def _shrunk(image: np.ndarray, box: FaceBox | None, longest_side: int) -> tuple[np.ndarray, FaceBox | None]:
    scale = longest_side / max(image.shape[:2])
    if scale >= 1:
        return image, box
    height, width = (max(1, round(size * scale)) for size in image.shape[:2])
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    if box is not None:
        box = box.moved(0, 0, scale).clipped(height, width)
    return image, box


@dataclass(frozen=True, kw_only=True)
class ForgeDataConfig:
    """Say which photos are forged, how often, how they are divided and where all goes."""

    photos: str = setting(
        help="folder of real faces, each folder below it one person; or a csv table (file, label, split, group)",
        positional=True,
    )
    output: str = setting(help="folder to write: images/, masks/, manifest.csv and conversations by split")
    versions: int = setting(1, "versions of each photo, each a little turned and lit differently; 1 = the photo alone")
    per_image: int = setting(1, "forgeries of each version; the untouched face stands beside them once")
    seed: int = setting(0, "seed of what is forged, of the splits and of the questions' order in dialogues")
    face: Literal["auto", "off"] = setting("auto", "auto = crop to the largest face, off = the image is a face crop")
    leaves: int = setting(0, "random pictures without a face to learn traces from; no conversation is about them")
    longest_side: int = setting(512, "larger faces are shrunk to this side, in pixels, before they are forged")
    format: Literal["png", "jpeg"] = setting("png", "of real and fake images alike; only png keeps the masks exact")
    jpeg_quality: int = setting(95, "of real and fake images alike, for format jpeg")
    test_groups: tuple[str, ...] = setting((), "persons to test on: folder, or file name without suffix")
    val_groups: tuple[str, ...] = setting((), "persons to validate on")
    test_fraction: float = setting(0.2, "part of the photos to test on when no test_groups are given; 0 = none")
    val_fraction: float = setting(0.2, "part of the others to validate on when no val_groups are given; 0 = none")
    forge: ForgeConfig = setting(ForgeConfig())
    augment: AugmentConfig = setting(AugmentConfig())

    def __post_init__(self) -> None:
        limits = {
            "versions": (1, 10_000),
            "per_image": (1, 10_000),
            "leaves": (0, 100_000),
            "longest_side": (64, 4096),
            "jpeg_quality": (1, 100),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: {getattr(self, name)} is not usable; allowed: {low} to {high}.")


@dataclass(frozen=True)
class Photo:
    """One photo: its number in the list, name, person, split, the folder of its versions, and where it lies."""

    number: int
    name: str
    group: str
    split: str
    folder: str
    path: Path


def build_forgeries(config: ForgeDataConfig, find_regions: RegionFinder = regions_by_eyes) -> dict[str, int]:
    """Write untouched and forged faces, masks, manifest.csv and conversations; gives the counts.

    An image is a function of (seed, number of the photo in the sorted list, its own number among those made of it).
    Photos without a usable face are left out and counted by reason. find_regions: a landmark detector in place of the
    canonical proportions. Raises ValueError for an output folder that holds something else.
    """
    output = Path(config.output)
    photos = _of_table(config) if config.photos.lower().endswith(".csv") else _of_folder(config)
    settings = {**to_dict(config), "photos": _digest(photos)}
    claim_folder(output, settings)
    write_run(output, settings, config.seed)
    counts: Counter[str] = Counter(photos=len(photos))
    items: list[Item] = []
    for photo in progress(photos, "forging", is_kept=True):
        crop = read_face(photo.path, config.face, config.longest_side, find_regions)
        if isinstance(crop, str):
            counts[crop] += 1
            log.info("%s: %s", photo.path, crop.replace("_", " "))
            continue
        written = _write_photo(output, photo, crop, config)
        counts["forgeries_too_faint"] += config.versions * (1 + config.per_image) - len(written)
        items += written
    if not items:
        raise ValueError(
            f"{config.photos!r}: no photo has a usable face ({dict(counts)}); --face off takes them whole."
        )
    counts.update(f"{item.record.split}/{LABEL_NAMES[item.record.label or REAL]}" for item in items)
    leaves = _write_leaves(output, config, find_regions)
    return {**counts, **({LEAVES: len(leaves)} if leaves else {}), **write_lists(output, items, leaves, config.seed)}


def _write_leaves(output: Path, config: ForgeDataConfig, find_regions: RegionFinder) -> list[Item]:
    """Draw pictures of dead leaves, all for training, and forge each as if it were a face in the middle of a crop."""
    items: list[Item] = []
    for number in range(config.leaves):
        crop = _crop(dead_leaves(config.longest_side, item_rng(config.seed, 0, number)), None, find_regions)
        if crop is not None:
            name = f"{LEAVES}/{number:05d}"
            photo = Photo(number, name, name, "train", LEAVES, output / name)
            items += _write_photo(output, photo, crop, replace(config, versions=1))
    return items


def divide(groups: Sequence[str], config: ForgeDataConfig) -> dict[str, str]:
    """Give the split of each group: as named, the rest by fractions of the photos. Raises ValueError for odd names."""
    for name, wanted in (("test_groups", config.test_groups), ("val_groups", config.val_groups)):
        unknown = next((group for group in wanted if group not in groups), None)
        if unknown is not None:
            raise ValueError(f"{name}: there is no {unknown!r} in {config.photos!r}. {nearest(unknown, set(groups))}")
    both = set(config.test_groups) & set(config.val_groups)
    if both:
        raise ValueError(f"{min(both)!r} stands in test_groups and val_groups; name it in one of them.")
    named = {*config.test_groups, *config.val_groups}
    test = set(config.test_groups) or _chosen(groups, config.test_fraction, named, config.seed)
    val = set(config.val_groups) or _chosen(groups, config.val_fraction, named | test, config.seed + 1)
    splits = {group: "test" if group in test else "val" if group in val else "train" for group in groups}
    if "train" not in splits.values():
        raise ValueError(f"No photo is left to train on: all {len(splits)} persons validate or test. Add photos.")
    return splits


def _chosen(groups: Sequence[str], fraction: float, taken: set[str], seed: int) -> set[str]:
    rest = [group for group in groups if group not in taken]
    return choose_groups(rest, fraction, seed) if fraction and rest else set()


def _of_table(config: ForgeDataConfig) -> list[Photo]:
    """List the real photos of a csv table, see `CsvSource`, in its splits; rows of other splits are left out."""
    if config.test_groups or config.val_groups:
        raise ValueError("test_groups, val_groups: the table says who tests and validates; leave them out.")
    records = [
        record
        for record in CsvSource(DataConfig(source="csv", path=config.photos)).records
        if record.label == REAL and record.split in SPLITS
    ]
    if not records:
        raise ValueError(f"{config.photos!r} names no real photo in a split {', '.join(SPLITS)}; correct its columns.")
    return [
        Photo(number, record.id, record.group, record.split, record.split, Path(record.where))
        for number, record in enumerate(records)
    ]


def _of_folder(config: ForgeDataConfig) -> list[Photo]:
    """List the photos of a folder, sorted by name, and divide their persons."""
    root = Path(config.photos)
    names = [path.relative_to(root) for path in _list_photos(root, Path(config.output))]
    splits = divide(list(map(_group, names)), config)
    return [
        Photo(number, name.as_posix(), _group(name), splits[_group(name)], splits[_group(name)], root / name)
        for number, name in enumerate(names)
    ]


def _list_photos(root: Path, output: Path) -> list[Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"Folder {str(root)!r} does not exist; give one of photos of real faces, or a table.")
    if output.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{str(output)!r} lies in {str(root)!r}, so forgeries would be taken for photos; move it.")
    photos = list_images(root)
    if not photos:
        raise FileNotFoundError(f"{str(root)!r} holds no images ({' '.join(IMAGE_SUFFIXES)}); give another folder.")
    return photos


def _group(name: Path) -> str:
    """Give the person: the first folder, or the file's own name."""
    return name.parts[0] if len(name.parts) > 1 else name.stem


def _digest(photos: Sequence[Photo]) -> str:
    """Tell one list of photos from another by names, sizes, persons and splits."""
    lines = "".join(f"{p.name} {p.path.stat().st_size} {p.group} {p.split}\n" for p in photos)
    return hashlib.sha256(lines.encode()).hexdigest()


def _write_photo(output: Path, photo: Photo, crop: FaceCrop, config: ForgeDataConfig) -> list[Item]:
    """Write every version of a face, untouched and forged; forgeries that stay too faint are missing."""
    items = []
    for version, variant in product(range(config.versions), range(config.per_image + 1)):
        number = version * (config.per_image + 1) + variant
        rng = item_rng(config.seed, number, photo.number)
        if variant == 0:
            first = number
            shown = _version(crop, config.augment, rng) if version else crop
        forgery = draw_forgery(shown.image, shown.regions, config.forge, rng) if variant else None
        if variant and forgery is None:
            continue
        item = _item(photo, number, first, forgery, shown, SUFFIXES[config.format])
        write_image(output / item.record.id, forgery.image if forgery else shown.image, config.jpeg_quality)
        if forgery:
            write_mask(output / item.record.tags["mask"], forgery.mask)
        items.append(item)
    return items


def _version(crop: FaceCrop, config: AugmentConfig, rng: np.random.Generator) -> FaceCrop:
    image, regions = augment(crop.image, crop.regions, config, rng)
    return FaceCrop(image=image, regions=disjoint(regions, *image.shape[:2]))


def _item(photo: Photo, number: int, first: int, forgery: Forgery | None, crop: FaceCrop, suffix: str) -> Item:
    """Describe one image; first: number of the untouched version that it was made from."""
    stem, untouched = (f"{photo.folder}/{photo.number:05d}_{n}" for n in (number, first))
    file, tags = f"{IMAGES}/{stem}{suffix}", {"region": "", "artefact": "", "mask": "", "original": photo.name}
    tags["untouched"] = f"{IMAGES}/{untouched}{suffix}"
    truth = None
    if forgery is not None:
        tags |= {"region": forgery.region, "artefact": forgery.artefact, "mask": f"{MASKS}/{stem}.png"}
        touched = [name for name in REGIONS if bool(((crop.regions[name] > 0) & (forgery.mask > 0)).any())]
        truth = Truth(region=forgery.region, artefact=forgery.artefact, touched=touched)
    record = Record(
        id=file,
        label=REAL if truth is None else FAKE,
        class_name=LABEL_NAMES[REAL] if truth is None else truth.artefact,
        video=file,
        group=photo.group,
        where=file,
        split=photo.split,
        tags=tags,
    )
    return Item(record=record, truth=truth)
