"""What an engine has seen: the newest images and faces, so that each is looked at once, however much is asked."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from llava.core.types import Verdict
from llava.explainer.decoding import Prefix
from llava.explainer.modeling import Encoded
from llava.pipeline.faces import Face
from llava.pipeline.findings import Finding
from llava.pipeline.pipeline import Image, Pipeline


@dataclass(eq=False)
class Seen:
    """An image that was looked at: its verdict, what the words need, and the prefixes that were run for it."""

    verdict: Verdict
    encoded: Encoded | None
    prefixes: dict[tuple[int, ...], Prefix] = field(default_factory=dict)


class Looks:
    """Looks at images with a pipeline and keeps the newest `most` of them, and as many faces, in memory."""

    def __init__(self, pipeline: Pipeline, most: int) -> None:
        self._pipeline, self._most = pipeline, most
        self.images: OrderedDict[str, Seen] = OrderedDict()
        self._faces: OrderedDict[str, Seen] = OrderedDict()

    def at(self, images: Sequence[tuple[np.ndarray, bool]]) -> list[Seen]:
        """Give what was seen of the largest face of each image; new ones are looked at as one batch.

        Beside each image stands whether it is a crop, and judged whole.
        """
        names = [f"{_digest(image)} {is_crop}" for image, is_crop in images]
        new = {name: asked for name, asked in zip(names, images, strict=True) if name not in self.images}
        faces = {name: self._face(*asked) for name, asked in new.items()}
        self.images |= {name: seen for name, face in faces.items() if (seen := self._known(face)) is not None}
        unknown = {name: face for name, face in faces.items() if name not in self.images}
        if unknown:
            looked = _pairs(*self._pipeline.look(list(unknown.values()), self._pipeline.stability))
            for name, (finding, row) in zip(unknown, looked, strict=True):
                self.images[name] = Seen(finding.verdict, row)
        found = [self.images[name] for name in names]
        _keep_newest(self.images, names, self._most)
        return found

    def findings(self, images: Sequence[Image]) -> list[Finding]:
        """Give the findings of images, and keep what was seen for questions about the same faces."""
        found = []
        for looked in self._pipeline.looks(images):
            for finding, row in _pairs(*looked):
                found.append(finding)
                if finding.pixels is not None:
                    name = _digest(finding.pixels)
                    self._faces[name] = Seen(finding.verdict, row)
                    _keep_newest(self._faces, [name], self._most)
        return found

    def _face(self, image: np.ndarray, is_crop: bool) -> Face:
        return Face(image="image 0", pixels=image) if is_crop else self._pipeline.face_of(image)

    def _known(self, face: Face) -> Seen | None:
        """Give what was seen when the same pixels were judged before, under the name and place of this face."""
        before = None if face.pixels is None else self._faces.get(_digest(face.pixels))
        if before is None:
            return None
        box = None if face.box is None else (face.box.x, face.box.y, face.box.width, face.box.height)
        verdict = replace(before.verdict, image=face.image, face=face.number, face_count=face.count, face_box=box)
        return Seen(verdict, before.encoded)


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
