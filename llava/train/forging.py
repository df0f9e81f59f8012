"""Fakes that are made in memory while a detector trains: each beside the untouched face that it was made from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llava.core.config import setting
from llava.core.input_specs import Wants
from llava.core.runtime import item_rng
from llava.core.terminal import progress
from llava.core.types import FAKE, REAL, Record, Sample
from llava.data.faces import FaceBox, face_square, find_faces
from llava.data.sources import EVERY_SPLIT, Source, split_of
from llava.ops.augment import AugmentConfig, augment
from llava.ops.degrade import require_within
from llava.ops.face_regions import disjoint, eyes_in_box, face_regions
from llava.ops.forge import ARTEFACTS, ForgeConfig, draw_forgery

log = logging.getLogger(__name__)
SEPARATOR = "#"  # between the name of a real record and what a fake made from it is called
FORGED = "forged"  # a fake of the training split, whose kind is drawn each time that it is read
MARGIN = 0.3  # as `m2f2 detect` cuts faces out; see `llava.data.faces.crop_face`


@dataclass(frozen=True, kw_only=True)
class ForgingConfig:
    """What is done to a face before it is forged, and what is forged.

    Outside the training split a face is cut out as `m2f2 detect` does it, nothing else is done to it, and one fake of
    each kind is made of it.
    """

    margin: tuple[float, float] = setting((0.1, 0.5), "training: width around the face, as a part of its box")
    augment: AugmentConfig = setting(AugmentConfig(), "training: how far a version may be from the photo")
    kinds: ForgeConfig = setting(ForgeConfig(), "training: how often what is forged, and how strongly")
    held_out: ForgeConfig = setting(ForgeConfig(), "the same outside the training split")

    def __post_init__(self) -> None:
        require_within("margin", self.margin, 0, 2)


class ForgingSource:
    """The real records of another source, and beside each what is forged of it when it is read.

    Of a training record one fake is made, of any other one fake of each kind, named by its class. All that is random is
    a function of the generator that a record is loaded with; without one, or outside the training split, of (seed,
    number of the record). A record and its fakes agree in the tag `untouched`. Images without a face are left out, with
    a warning; raises ValueError when all are. only: the split that it has the records of, and looks for faces in; what
    is forged of them is the same whatever it is.
    """

    def __init__(self, source: Source, config: ForgingConfig, train: str, seed: int, only: str = EVERY_SPLIT) -> None:
        self.config, self._source, self._train, self._seed = config, source, train, seed
        reals = [record for record in source.records if record.label == REAL]
        self._numbers = {record.id: number for number, record in enumerate(reals)}
        chosen = [record for record in split_of(source, only) if record.id in self._numbers]
        self._boxes = _boxes(source, chosen)
        self._records = tuple(each for r in chosen if r.id in self._boxes for each in self._with_fakes(r))

    @property
    def records(self) -> Sequence[Record]:
        """Give every real record, each followed by its fakes; no pixel is read for it."""
        return self._records

    def _with_fakes(self, real: Record) -> list[Record]:
        real = replace(real, tags={**real.tags, "untouched": real.id})
        kinds = (FORGED,) if real.split == self._train else ARTEFACTS
        names = [f"{SEPARATOR}{kind}" for kind in kinds]
        fakes = [
            replace(real, id=real.id + name, video=real.video + name, label=FAKE, class_name=kind)
            for name, kind in zip(names, kinds, strict=True)
        ]
        return [real, *fakes]

    def load(self, record: Record, rng: np.random.Generator | None = None, wants: Wants | None = None) -> Sample:
        """Read a face, and forge it if it is to be fake: image, mask of forged pixels, tags `region` and `artefact`.

        Equal generators give a real record and its fake the same crop and version. Raises ValueError for a face that
        cannot be forged so that it shows.
        """
        real = record.tags["untouched"]
        drawn = rng if record.split == self._train else None  # what is held out is always the same
        sample = self._source.load(replace(record, id=real))
        margin = MARGIN if drawn is None else drawn.uniform(*self.config.margin)
        image, regions = cut_out(sample.image, self._boxes[real], margin)
        if drawn is not None:
            image, moved = augment(image, regions, self.config.augment, drawn)
            regions = disjoint(moved, *image.shape[:2])
        if record.label == REAL:
            return Sample(record=record, image=image, mask=np.zeros(image.shape[:2], np.uint8))
        # A generator of its own, so that what comes after it stays in step with the real record's.
        number = 1 + (*ARTEFACTS, FORGED).index(record.class_name)
        dice = item_rng(self._seed, number, self._numbers[real]) if drawn is None else drawn.spawn(1)[0]
        kind = None if record.class_name == FORGED else record.class_name
        kinds = self.config.held_out if drawn is None else self.config.kinds
        forgery = draw_forgery(image, regions, kinds, dice, kind)
        if forgery is None:
            raise ValueError(f"{record.id!r} cannot be forged so that it shows; lower least_change, or leave it out.")
        tags = {**record.tags, "region": forgery.region, "artefact": forgery.artefact}
        mask = np.ceil(forgery.mask * 255).astype(np.uint8)
        return Sample(record=replace(record, tags=tags), image=forgery.image, mask=mask)

    def why_unreadable(self, record: Record) -> str:
        """Say what the source says of the real record."""
        return self._source.why_unreadable(replace(record, id=record.tags["untouched"]))


def cut_out(image: np.ndarray, box: FaceBox, margin: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Cut a face out with a margin, see `crop_face`: its pixels, and the masks of its regions."""
    left, top, side = face_square(box, image.shape[0], image.shape[1], margin)
    inner = box.moved(-left, -top)
    eyes = inner.eyes or eyes_in_box(inner.x, inner.y, inner.width, inner.height)
    return np.ascontiguousarray(image[top : top + side, left : left + side]), face_regions(side, side, eyes)


def _boxes(source: Source, records: Sequence[Record]) -> dict[str, FaceBox]:
    """Find the largest face of each record, by the record's name."""
    found = {record.id: find_faces(source.load(record).image) for record in progress(records, "finding faces")}
    boxes = {name: faces[0] for name, faces in found.items() if faces}
    without = [name for name, faces in found.items() if not faces]
    if without:
        log.warning("%d of %d images show no face (first: %r); they are left out", len(without), len(found), without[0])
    if not boxes:
        raise ValueError(f"None of the {len(found)} real images shows a face; give photos of real faces to forge.")
    return boxes
