"""What an engine has seen: the newest images and faces, so that each is looked at once, however much is asked."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import islice
from threading import Lock, Semaphore
from weakref import WeakValueDictionary

import numpy as np

from llava.explainer.decoding import Prefix
from llava.explainer.modeling import Encoded
from llava.pipeline.faces import Face, prepared
from llava.pipeline.findings import Finding
from llava.pipeline.given import Image
from llava.pipeline.pipeline import Pipeline

PREPARED_TOGETHER = 2  # images; the delivered versions of a large one take hundreds of megabytes


@dataclass(eq=False)
class Seen:
    """An image that was looked at: the finding, what the words need, and the prefixes that were run for it."""

    finding: Finding
    encoded: Encoded | None
    prefixes: dict[tuple[int, ...], Prefix] = field(default_factory=dict)


@dataclass(eq=False)
class Asked:
    """An image that is asked about.

    is_crop: it is judged whole. face: found and made ready in the thread that asks; None = it was seen before.
    """

    image: np.ndarray
    is_crop: bool
    name: str
    face: Future[Face] | None


class Looks:
    """Looks at images with a pipeline and keeps the newest `most` of them, and as many faces, in memory.

    `asked` and `ready` may be called from any thread, `at` and `judged` from the one that owns the model.
    """

    def __init__(self, pipeline: Pipeline, most: int) -> None:
        self._pipeline, self._most = pipeline, most
        self.images: OrderedDict[str, Seen] = OrderedDict()
        self._faces: OrderedDict[str, Seen] = OrderedDict()
        self._coming: WeakValueDictionary[str, Future[Face]] = WeakValueDictionary()
        self._entry, self._few = Lock(), Semaphore(PREPARED_TOGETHER)

    def asked(self, image: np.ndarray, is_crop: bool = False) -> Asked:
        """Find the face and make it ready, once for all who ask about the same new image."""
        name = f"{_digest(image)} {is_crop}"
        with self._entry:
            if name in self.images:
                return Asked(image, is_crop, name, None)
            face = self._coming.get(name)
            is_first = face is None
            if face is None:
                face = self._coming[name] = Future()
        if is_first:
            try:
                with self._few:
                    face.set_result(self._ready(image, is_crop))
            except Exception as error:
                face.set_exception(error)
        face.result()
        return Asked(image, is_crop, name, face)

    def at(self, asked: Sequence[Asked]) -> list[Seen]:
        """Give what was seen of the largest face of each image; new ones are looked at as one batch."""
        new = {each.name: each for each in asked if each.name not in self.images}
        faces = {
            name: each.face.result() if each.face else self._ready(each.image, each.is_crop)
            for name, each in new.items()
        }
        self.images |= zip(faces, self._seen(list(faces.values())), strict=True)
        seen = [self.images[each.name] for each in asked]
        for each in asked:
            each.face = None  # what was made ready takes memory
        _keep_newest(self.images, [each.name for each in asked], self._most)
        return seen

    def ready(self, images: Sequence[Image]) -> Iterator[list[Face]]:
        """Yield the faces of images, found and made ready, batch by batch; few callers hold one at a time."""
        faces = self._pipeline.faces_in(images)
        while True:
            with self._few:
                batch = [self._prepared(face) for face in islice(faces, self._pipeline.batch_size)]
                if not batch:
                    return
                yield batch

    def judged(self, faces: Sequence[Face]) -> list[Finding]:
        """Give the findings of faces, and keep what was seen for questions about them."""
        return [seen.finding for seen in self._seen(faces)]

    def _ready(self, image: np.ndarray, is_crop: bool) -> Face:
        return self._prepared(Face(image="image 0", pixels=image) if is_crop else self._pipeline.face_of(image))

    def _prepared(self, face: Face) -> Face:
        """Give a face with all that the model reads of it, unless the same pixels were judged before."""
        if face.pixels is not None and _digest(face.pixels) in self._faces:
            return face
        return prepared(face, self._pipeline.needed_explainer(), self._pipeline.stability)

    def _seen(self, faces: Sequence[Face]) -> list[Seen]:
        """Give what was seen of faces, and keep it; those that are new are looked at as one batch."""
        known = [self._known(face) for face in faces]
        new = [face for face, before in zip(faces, known, strict=True) if before is None]
        looked = _pairs(*self._pipeline.look(new, self._pipeline.stability)) if new else iter(())
        seen = [before or Seen(*next(looked)) for before in known]
        for each in seen:
            if each.finding.pixels is not None:
                name = _digest(each.finding.pixels)
                self._faces[name] = each
                _keep_newest(self._faces, [name], self._most)
        return seen

    def _known(self, face: Face) -> Seen | None:
        """Give what was seen when the same pixels were judged before, under the name and place of this face."""
        before = None if face.pixels is None else self._faces.get(_digest(face.pixels))
        if before is None:
            return None
        box = None if face.box is None else (face.box.x, face.box.y, face.box.width, face.box.height)
        verdict = replace(
            before.finding.verdict, image=face.image, face=face.number, face_count=face.count, face_box=box
        )
        return Seen(replace(before.finding, verdict=verdict), before.encoded, before.prefixes)


def _pairs(found: Sequence[Finding], encoded: Encoded | None) -> Iterator[tuple[Finding, Encoded | None]]:
    """Yield each finding with its own row of what the explainer made of those that have pixels."""
    rows = iter(range(len(found)))
    for finding in found:
        yield finding, None if encoded is None or finding.pixels is None else encoded.take([next(rows)])


def _keep_newest(kept: OrderedDict[str, Seen], used: Sequence[str], most: int) -> None:
    """Count what was used as newest, and let go of the oldest beyond `most`."""
    for name in used:
        kept.move_to_end(name)
    while len(kept) > most:
        kept.popitem(last=False)


def _digest(image: np.ndarray) -> str:
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()
