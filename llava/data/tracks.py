"""Faces of single frames linked over time: which boxes are the same face."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import hypot

from llava.data.faces import FaceBox


def link_faces(frames: Sequence[Sequence[FaceBox]], overlap: float, shift: float) -> list[dict[int, int]]:
    """Link the boxes of frames into tracks: number of a frame -> number of its box there.

    A box continues a track when it overlaps the track's last box by an IoU of `overlap`, or when their centres lie at
    most `shift` widths of the narrower one apart; the best pairs (IoU, then distance) are linked first. A face may be
    missing in between. Gives the longest track first; of equally long ones the one with larger boxes.
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
    """Give the distance of two boxes' centres in widths of the narrower one."""
    x, y = a.x + a.width / 2 - b.x - b.width / 2, a.y + a.height / 2 - b.y - b.height / 2
    return hypot(x, y) / min(a.width, b.width)


def _area(box: FaceBox) -> int:
    return box.width * box.height
