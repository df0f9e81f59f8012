"""Faces: find them with their landmarks, cut them out, link them over frames; none, or several, is an answer.

The finder is MTCNN (Zhang et al. 2016) with the weights that facenet-pytorch carries in its wheel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import atan2, cos, degrees, hypot, radians, sin
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import cv2
import numpy as np

from llava.core.config import setting

if TYPE_CHECKING:
    from torch import nn

Point: TypeAlias = tuple[float, float]
Place: TypeAlias = tuple[int, int, int, int]  # x, y, width, height of a face in its crop, in pixels
PYRAMID_STEP = 0.709  # between two scales: halves the area, as Zhang et al. do
# In diagonals of the box; less than half of the least in 25 real portraits (0.24, 0.24).
LEAST_EYE_DISTANCE, LEAST_MOUTH_DEPTH = 0.1, 0.1
SURE = 0.98
# From this score on a face is upright: 462 of 517 portraits have it; of 173 upside down 34 are found as if upright, one
# with it. Those below it are turned: 32 of these 33 were 9 times less unsure then or more, an upright one 1.3 times.
UPRIGHT, MUCH_SURER = 0.999, 3.0
# From this overlap (IoU) on, or this many longer sides apart, two boxes are the same face; so it is in `m2f2 detect`.
OVERLAP, SHIFT = 0.3, 1.0
AROUND = 0.6  # margin of what is turned around a face that may not be upright


@dataclass(frozen=True, kw_only=True)
class FaceBox:
    """A face's box in pixels of the image, origin top left, clipped to it; score in [0, 1], higher = surer.

    landmarks: (x, y) in pixels of left eye, right eye, nose, left and right mouth corner, left as seen upright; they
    may lie outside the image; empty = not known. inside: the share of the unclipped box that lies in the image.
    """

    x: int
    y: int
    width: int
    height: int
    score: float
    landmarks: tuple[Point, ...] = ()
    inside: float = 1.0

    @property
    def eyes(self) -> tuple[Point, Point] | None:
        """Give the eye on the left of an upright face, then the other; None without landmarks."""
        return (self.landmarks[0], self.landmarks[1]) if self.landmarks else None

    @property
    def roll(self) -> float | None:
        """Give by how many degrees the line of the eyes is turned clockwise, in (-180, 180]; None without landmarks."""
        if not self.landmarks:
            return None
        (left_x, left_y), (right_x, right_y) = self.landmarks[:2]
        return degrees(atan2(right_y - left_y, right_x - left_x))

    def moved(self, x: float, y: float, scale: float = 1.0) -> FaceBox:
        """Give the box scaled, then moved by (x, y) pixels."""
        left, top, right, bottom = (
            round(value)
            for value in (
                self.x * scale + x,
                self.y * scale + y,
                (self.x + self.width) * scale + x,
                (self.y + self.height) * scale + y,
            )
        )
        points = tuple((px * scale + x, py * scale + y) for px, py in self.landmarks)
        return replace(self, x=left, y=top, width=right - left, height=bottom - top, landmarks=points)

    def turned(self, width: int) -> FaceBox:
        """Give the box in the image, `width` wide, after a quarter turn to the left (np.rot90)."""
        points = tuple((y, width - x) for x, y in self.landmarks)
        x, y = self.y, width - self.x - self.width
        return replace(self, x=x, y=y, width=self.height, height=self.width, landmarks=points)

    def clipped(self, height: int, width: int) -> FaceBox | None:
        """Give what of the box lies in an image of that size; None when nothing does."""
        left, top = max(self.x, 0), max(self.y, 0)
        right, bottom = min(self.x + self.width, width), min(self.y + self.height, height)
        if right <= left or bottom <= top:
            return None
        inside = self.inside * (right - left) * (bottom - top) / (self.width * self.height)
        return replace(self, x=left, y=top, width=right - left, height=bottom - top, inside=inside)


@dataclass(frozen=True, kw_only=True)
class FinderConfig:
    """Settings of the search; eval/measure_faces.py measures what they find.

    The nets see a box 16 px wide and more (docs/data.md), so 1,024 shows them 32 px, the least that is judged, of a
    picture up to 2,048 px (32 * 1,024 / 2,048 = 16), on (1,024 / 1,280) ** 2 = 0.64 of the pixels of 1,280.
    """

    longest_side: int = setting(1024, "larger images are shrunk to this longest side, in pixels, before the search")
    smallest: int = setting(20, "smallest face that is looked for, in pixels of the searched image; 20 or more")
    first_scores: tuple[float, float] = setting((0.6, 0.7), "what the first two nets must be sure of to pass a window")
    score: float = setting(0.95, "from this score on it is a face")
    steepest: float = setting(60.0, "degrees that the line of the eyes may be turned")


def find_faces(image: np.ndarray, config: FinderConfig | None = None) -> list[FaceBox]:
    """List the faces of an image, uint8 RGB (H, W, 3), largest first; an empty list when there is none.

    One upside down may be among them, with false landmarks: `lie_of_face` tells.
    """
    config = config or FinderConfig()
    height, width = image.shape[:2]
    image, scale = shrunk(image, config.longest_side)
    found = [face.moved(0, 0, 1 / scale).clipped(height, width) for face in _search(image, config)]
    faces = [face for face in found if face is not None]
    return sorted(faces, key=lambda b: (-_area(b), b.x, b.y))


def shrunk(image: np.ndarray, longest_side: int) -> tuple[np.ndarray, float]:
    """Give an image with that longest side at most, in pixels, and the scale, 1 for one that is small enough."""
    height, width = image.shape[:2]
    scale = min(1.0, longest_side / max(height, width))
    if scale == 1.0:
        return image, scale
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA), scale


def has_plausible_landmarks(face: FaceBox, steepest: float = 60.0) -> bool:
    """Say whether the landmarks lie as in a face: two eyes apart, the nose below them, the mouth below the nose.

    steepest: degrees that the line of the eyes may be turned.
    """
    if not face.landmarks or face.roll is None:
        return False
    turn, side = radians(face.roll), hypot(face.width, face.height)
    origin_x, origin_y = face.landmarks[0]
    # In the frame of the eyes: u along their line, v down the face, in units of the box's diagonal.
    upright = [
        (
            ((x - origin_x) * cos(turn) + (y - origin_y) * sin(turn)) / side,
            ((y - origin_y) * cos(turn) - (x - origin_x) * sin(turn)) / side,
        )
        for x, y in face.landmarks
    ]
    _, right_eye, nose, left_mouth, right_mouth = upright
    mouth = (left_mouth[1] + right_mouth[1]) / 2
    return (
        abs(face.roll) <= steepest
        and right_eye[0] >= LEAST_EYE_DISTANCE
        and 0 < nose[1] < mouth
        and mouth >= LEAST_MOUTH_DEPTH
        and left_mouth[0] < right_mouth[0]
    )


def is_sure(face: FaceBox) -> bool:
    """Say whether it is a face beyond doubt: what is forged or said to lie sideways must be."""
    return face.score >= SURE and has_plausible_landmarks(face, steepest=30.0)


# A second look, where the first saw nothing, is for what is large: from 16 / 480 = 3.3 % of the longer side on. Of 53
# faces of 5 % and more it found all. On a texture of 1,920 px the first look takes 182 ms, with four second ones 382.
SECOND_LOOK = FinderConfig(longest_side=480)
CLOSE_LOOK = FinderConfig(longest_side=160)  # at a single face and what is around it


def lying_faces(image: np.ndarray, config: FinderConfig = SECOND_LOOK) -> tuple[int, list[FaceBox]]:
    """Give the quarter turns to the left (np.rot90) that set faces upright, and their boxes as they lie, largest first.

    Of the three turns the one with the surest face counts; (0, []) when none shows a face beyond doubt.
    """
    small, scale = shrunk(image, config.longest_side)
    height, width = small.shape[:2]
    found = {turns: _sure_faces(np.rot90(small, turns), config) for turns in (1, 3, 2)}
    best = max(found, key=lambda turns: _surest(found[turns]))
    faces = found[best]
    for turn in range(best, 4):  # turned on, to where they were
        faces = [face.turned(height if turn % 2 else width) for face in faces]
    return (best, [face.moved(0, 0, 1 / scale) for face in faces]) if faces else (0, [])


def lie_of_face(image: np.ndarray, face: FaceBox) -> tuple[int, FaceBox]:
    """Give the quarter turns to the left that set a face upright, and the face as it lies; 0 turns for an upright one.

    The nets also fire on faces upside down, with the eyes at the mouth: a doubtful one is turned and looked at again.
    """
    if face.score >= UPRIGHT:
        return 0, face
    left, top, side = face_square(face, image.shape[0], image.shape[1], AROUND)
    around = image[top : top + side, left : left + side]
    turns, faces = lying_faces(around, CLOSE_LOOK)
    as_found = max(face.score, _surest(_sure_faces(around, CLOSE_LOOK)))
    if not faces or MUCH_SURER * (1 - _surest(faces)) >= 1 - as_found:
        return 0, face
    return turns, max(faces, key=lambda each: each.score).moved(left, top)


def _sure_faces(image: np.ndarray, config: FinderConfig) -> list[FaceBox]:
    return [face for face in find_faces(np.ascontiguousarray(image), config) if is_sure(face)]


def _surest(faces: Sequence[FaceBox]) -> float:
    return max((face.score for face in faces), default=0.0)


def _search(image: np.ndarray, config: FinderConfig) -> list[FaceBox]:
    """Run the three nets on an image; faces that are sure and look like one."""
    if min(image.shape[:2]) < config.smallest:
        return []  # the pyramid of scales would be empty, which `detect_face` does not survive
    import torch
    from facenet_pytorch.models.utils.detect_face import detect_face

    thresholds = [*config.first_scores, config.score]
    with torch.inference_mode():
        rows, points = detect_face(image, config.smallest, *_open_nets(), thresholds, PYRAMID_STEP, torch.device("cpu"))
    faces = []
    for (left, top, right, bottom, score), marks in zip(rows[0].tolist(), points[0].tolist(), strict=True):
        x, y = round(left), round(top)
        width, height = round(right) - x, round(bottom) - y
        if width < 1 or height < 1:
            continue
        marks = tuple((float(px), float(py)) for px, py in marks)
        face = FaceBox(x=x, y=y, width=width, height=height, score=score, landmarks=marks)
        if has_plausible_landmarks(face, config.steepest):
            faces.append(face)
    return faces


@lru_cache(maxsize=1)
def _open_nets() -> tuple[nn.Module, nn.Module, nn.Module]:
    """Read the three nets, once per process; their own constructors would unpickle whatever the files hold."""
    import facenet_pytorch
    import torch
    from facenet_pytorch.models import mtcnn

    folder = Path(facenet_pytorch.__file__).parent / "data"
    nets = []
    for name, kind in (("pnet", mtcnn.PNet), ("rnet", mtcnn.RNet), ("onet", mtcnn.ONet)):
        net = kind(pretrained=False)
        net.load_state_dict(torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True))
        nets.append(net.eval().requires_grad_(False))
    return nets[0], nets[1], nets[2]


def crop_face(image: np.ndarray, box: FaceBox, margin: float = 0.3) -> np.ndarray:
    """Cut a square around a face, `margin` of the box's longer side wider on every side.

    At the image's border the square is moved inwards; when it is larger than the image's shorter side, it is shrunk
    to that. So the crop is always square and always made of real pixels, never padded, but the face may be off centre.
    """
    left, top, side = face_square(box, image.shape[0], image.shape[1], margin)
    return np.ascontiguousarray(image[top : top + side, left : left + side])


def face_square(box: FaceBox, height: int, width: int, margin: float = 0.3) -> tuple[int, int, int]:
    """Give (left, top, side) in pixels of the square that `crop_face` cuts out of an image of that size."""
    if margin < 0:
        raise ValueError(f"margin: {margin} is not usable; allowed: 0 or more, 0.3 leaves hair and chin in.")
    side = min(round(max(box.width, box.height) * (1 + 2 * margin)), height, width)
    left = min(max(round(box.x + box.width / 2 - side / 2), 0), width - side)
    top = min(max(round(box.y + box.height / 2 - side / 2), 0), height - side)
    return left, top, side


def place_in_crop(box: FaceBox, height: int, width: int, margin: float = 0.3) -> Place:
    """Give where a face lies in what `crop_face` cuts out of an image of that size."""
    left, top, _ = face_square(box, height, width, margin)
    return box.x - left, box.y - top, box.width, box.height


def link_faces(frames: Sequence[Sequence[FaceBox]], overlap: float, shift: float) -> list[dict[int, int]]:
    """Link the boxes of frames into tracks: number of a frame -> number of its box there.

    A box continues a track when it overlaps the track's last box by an IoU of `overlap`, or when their centres lie at
    most `shift` times the longer side of the smaller one apart; the best pairs (IoU, then distance) are linked first. A
    face may be missing in between. Gives the longest track first; of equally long ones the one with larger boxes.
    """
    tracks: list[dict[int, int]] = []
    last: list[FaceBox] = []
    for number, boxes in enumerate(frames):
        links = _links(last, boxes, overlap, shift)
        for index, box in enumerate(boxes):
            track = links.get(index, len(tracks))
            if track == len(tracks):
                tracks.append({})
                last.append(box)
            tracks[track][number] = index
            last[track] = box
    areas = [sum(_area(frames[n][i]) for n, i in track.items()) / len(track) for track in tracks]
    order = sorted(range(len(tracks)), key=lambda t: (-len(tracks[t]), -areas[t]))
    return [tracks[t] for t in order]


def iou(a: FaceBox, b: FaceBox) -> float:
    """Give the intersection of two boxes over their union, in [0, 1]."""
    width = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
    height = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
    common = max(width, 0) * max(height, 0)
    return common / (_area(a) + _area(b) - common)


def _links(last: Sequence[FaceBox], boxes: Sequence[FaceBox], overlap: float, shift: float) -> dict[int, int]:
    """Give number of a box -> number of the track that it continues; each at most once."""
    pairs = []
    for (t, before), (i, box) in product(enumerate(last), enumerate(boxes)):
        shared, distance = iou(before, box), _distance(before, box)
        if shared >= overlap or distance <= shift:
            pairs.append((-shared, distance, t, i))
    links: dict[int, int] = {}
    for _, _, t, i in sorted(pairs):
        if i not in links and t not in links.values():
            links[i] = t
    return links


def _distance(a: FaceBox, b: FaceBox) -> float:
    """Give the distance of two boxes' centres in longer sides of the smaller one; a turned head's box gets narrow."""
    x, y = a.x + a.width / 2 - b.x - b.width / 2, a.y + a.height / 2 - b.y - b.height / 2
    return hypot(x, y) / min(max(a.width, a.height), max(b.width, b.height))


def _area(box: FaceBox) -> int:
    return box.width * box.height
