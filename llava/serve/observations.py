"""Images that a model looked at: each once, however many questions come about it; the newest are kept in memory."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import islice
from threading import Lock, Semaphore
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np

from llava.data.inputs import Image
from llava.pipeline.crops import Face, prepared
from llava.pipeline.pipeline import Pipeline
from llava.pipeline.verdict import Finding

if TYPE_CHECKING:
    from llava.explainer.generation import Prefix
    from llava.explainer.modeling import Encoded

# Images at a time in a process, for all its models: the delivered versions of a large one take hundreds of megabytes.
PREPARING = Semaphore(2)


@dataclass(eq=False)
class Observation:
    """An image that was looked at: the finding, what the words need, and the prefixes that were run for it."""

    finding: Finding
    encoded: Encoded | None
    prefixes: dict[tuple[int, ...], Prefix] = field(default_factory=dict)


@dataclass(eq=False)
class Inquiry:
    """An image that is asked about.

    is_crop: it is judged whole. face: found and made ready in the thread that asks; None = it was seen before.
    """

    image: np.ndarray
    is_crop: bool
    name: str
    face: Future[Face] | None


class Observations:
    """Looks at images with a pipeline and keeps the newest `most` of them, and as many faces, in memory.

    `inquiry` and `ready` may be called from any thread, `at` and `judged` from the one that owns the model.
    """

    def __init__(self, pipeline: Pipeline, most: int) -> None:
        self._pipeline, self._most = pipeline, most
        self.images: OrderedDict[str, Observation] = OrderedDict()
        self._faces: OrderedDict[str, Observation] = OrderedDict()
        self._coming: WeakValueDictionary[str, Future[Face]] = WeakValueDictionary()
        self._entry = Lock()

    def inquiry(self, image: np.ndarray, is_crop: bool = False) -> Inquiry:
        """Find the face and make it ready, once for all who ask about the same new image."""
        name = f"{_digest(image)} {is_crop}"
        with self._entry:
            if name in self.images:
                return Inquiry(image, is_crop, name, None)
            face = self._coming.get(name)
            is_first = face is None
            if face is None:
                face = self._coming[name] = Future()
        if is_first:
            try:
                with PREPARING:
                    face.set_result(self._ready(image, is_crop))
            except Exception as error:
                face.set_exception(error)
        face.result()
        return Inquiry(image, is_crop, name, face)

    def at(self, inquiries: Sequence[Inquiry]) -> list[Observation]:
        """Give what was seen of the largest face of each image; new ones are looked at as one batch."""
        new = {each.name: each for each in inquiries if each.name not in self.images}
        faces = {
            name: each.face.result() if each.face else self._ready(each.image, each.is_crop)
            for name, each in new.items()
        }
        self.images |= zip(faces, self._observed(list(faces.values())), strict=True)
        known = [self.images[each.name] for each in inquiries]
        for each in inquiries:
            each.face = None  # what was made ready takes memory
        _keep_newest(self.images, [each.name for each in inquiries], self._most)
        return known

    def ready(self, images: Sequence[Image]) -> Iterator[list[Face]]:
        """Yield the faces of images, found and made ready, batch by batch; few callers hold one at a time."""
        faces = self._pipeline.faces_in(images)
        while True:
            with PREPARING:
                batch = [self._prepared(face) for face in islice(faces, self._pipeline.batch_size)]
                if not batch:
                    return
                yield batch

    def judged(self, faces: Sequence[Face]) -> list[Finding]:
        """Give the findings of faces, and keep what was seen for questions about them."""
        return [sight.finding for sight in self._observed(faces)]

    def _ready(self, image: np.ndarray, is_crop: bool) -> Face:
        return self._prepared(Face(image="image 0", pixels=image) if is_crop else self._pipeline.face_of(image))

    def _prepared(self, face: Face) -> Face:
        """Give a face with all that the model reads of it, unless the same pixels were judged before."""
        if face.pixels is not None and _digest(face.pixels) in self._faces:
            return face
        return prepared(face, self._pipeline.pixels, self._pipeline.stability)

    def _observed(self, faces: Sequence[Face]) -> list[Observation]:
        """Give what was seen of faces, and keep it; those that are new are looked at as one batch."""
        known = [self._known(face) for face in faces]
        new = [face for face, before in zip(faces, known, strict=True) if before is None]
        looked = _pairs(*self._pipeline.look(new, self._pipeline.stability)) if new else iter(())
        observations = [before or Observation(*next(looked)) for before in known]
        for each in observations:
            if each.finding.pixels is not None:
                name = _digest(each.finding.pixels)
                self._faces[name] = each
                _keep_newest(self._faces, [name], self._most)
        return observations

    def _known(self, face: Face) -> Observation | None:
        """Give what was seen when the same pixels were judged before, under the name and place of this face."""
        before = None if face.pixels is None else self._faces.get(_digest(face.pixels))
        if before is None:
            return None
        verdict = replace(
            before.finding.verdict, image=face.image, face=face.number, face_count=face.count, **face.place
        )
        return Observation(replace(before.finding, verdict=verdict), before.encoded, before.prefixes)


def _pairs(found: Sequence[Finding], encoded: Encoded | None) -> Iterator[tuple[Finding, Encoded | None]]:
    """Yield each finding with its own row of what the explainer made of those that have pixels."""
    rows = iter(range(len(found)))
    for finding in found:
        yield finding, None if encoded is None or finding.pixels is None else encoded.take([next(rows)])


def _keep_newest(kept: OrderedDict[str, Observation], used: Sequence[str], most: int) -> None:
    """Count what was used as newest, and let go of the oldest beyond `most`."""
    for name in used:
        kept.move_to_end(name)
    while len(kept) > most:
        kept.popitem(last=False)


def _digest(image: np.ndarray) -> str:
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()
