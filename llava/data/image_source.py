"""What all sources of single images share: reading, face crop, memory cache, counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llava.core.types import REAL, Record, Sample
from llava.data.faces import crop_face, find_faces
from llava.data.images import read_image
from llava.data.sources import DataConfig
from llava.data.storage import ImageStore, stored_image


class ImageSource:
    """Records with one image each; a subclass lists the records.

    With `face_crop`, a sample's record says in its tag `face` whether the largest of `one` or `several` faces was
    cut out, or there was `none` and the image is whole; `face_counts` adds these up within this process.
    """

    def __init__(self, config: DataConfig, records: Sequence[Record], store: ImageStore | None = None) -> None:
        self.config = config
        self._records = tuple(records)
        self._store = store
        self._cache: dict[str, tuple[np.ndarray, str]] = {}
        self.face_counts: Counter[str] = Counter()

    @property
    def records(self) -> Sequence[Record]:
        """Give every record; no pixel is read for it."""
        return self._records

    def load(self, record: Record, rng: np.random.Generator | None = None) -> Sample:
        """Read the record's image, uint8 RGB (H, W, 3). Raises UnreadableImage naming the file."""
        image, face = self._image(record)
        if face:
            record = replace(record, tags={**record.tags, "face": face})
        mask = self._mask(record, image) if self.config.masks else None
        return Sample(record=record, image=image, mask=mask)

    def _mask(self, record: Record, image: np.ndarray) -> np.ndarray | None:
        """Read the mask of forged pixels that the record's tag names; nothing is forged in a real image."""
        if record.label == REAL:
            return np.zeros(image.shape[:2], np.uint8)
        name = record.tags.get("mask")
        if not name:
            return None
        place = self._store.locate(name) if self._store else None
        if place is None:
            raise FileNotFoundError(f"{record.id}: its mask {name!r} does not exist; correct it, or leave `masks` off.")
        mask = read_image(stored_image(place), name=place)[..., 0]
        if mask.shape != image.shape[:2]:
            raise ValueError(f"{place}: the mask is {mask.shape}, its image {image.shape[:2]}; they must be alike.")
        return mask

    def _read(self, where: str) -> np.ndarray:
        """Read the pixels of one image, uint8 RGB (H, W, 3)."""
        return read_image(stored_image(where), name=where)

    def _image(self, record: Record) -> tuple[np.ndarray, str]:
        if record.where in self._cache:
            return self._cache[record.where]
        image = self._read(record.where)
        face = ""
        if self.config.face_crop:
            image, face = _largest_face(image)
            self.face_counts[face] += 1
        if self.config.cache:
            # Shared by every later sample, so nobody may write into it.
            image.setflags(write=False)
            self._cache[record.where] = (image, face)
        return image, face


def _largest_face(image: np.ndarray) -> tuple[np.ndarray, str]:
    faces = find_faces(image)
    if not faces:
        return image, "none"
    return crop_face(image, faces[0]), "one" if len(faces) == 1 else "several"
