"""Which boxes of several frames are the same face."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou

from llava.data.faces import FaceBox, iou, link_faces


def box(x: int, y: int, width: int, height: int | None = None) -> FaceBox:
    return FaceBox(x=x, y=y, width=width, height=height or width, score=1.0)


@pytest.mark.parametrize("other", [box(0, 0, 10), box(5, 5, 10), box(3, 2, 4, 6), box(10, 0, 10), box(50, 50, 3)])
def test_iou_is_torchvision_s(other: FaceBox) -> None:
    one = box(0, 0, 10)
    corners = torch.tensor([[b.x, b.y, b.x + b.width, b.y + b.height] for b in (one, other)], dtype=torch.float64)
    assert iou(one, other) == iou(other, one) == pytest.approx(float(box_iou(corners[:1], corners[1:])))


def test_two_faces_that_move_stay_two_in_any_order() -> None:
    left, right = [box(10 * i, 0, 40) for i in range(5)], [box(200 - 10 * i, 5, 50) for i in range(5)]
    frames = [[a, b] if i % 2 else [b, a] for i, (a, b) in enumerate(zip(left, right, strict=True))]
    first, second = link_faces(frames, overlap=0.3, shift=1.0)
    assert [frames[n][i] for n, i in sorted(first.items())] == right  # as long as the other, and larger
    assert [frames[n][i] for n, i in sorted(second.items())] == left


def test_the_longest_comes_before_the_largest() -> None:
    frames = [[box(0, 0, 20)], [box(0, 0, 20), box(100, 0, 90)], [box(0, 0, 20)]]
    assert link_faces(frames, overlap=0.3, shift=1.0) == [{0: 0, 1: 0, 2: 0}, {1: 1}]


def test_a_face_may_be_missing_for_a_while() -> None:
    assert link_faces([[box(0, 0, 20)], [], [], [box(4, 0, 20)]], overlap=0.3, shift=1.0) == [{0: 0, 3: 0}]


def test_overlap_or_distance_links() -> None:
    fast = [[box(0, 0, 20)], [box(20, 0, 20)]]  # beside each other: IoU 0, centres one width apart
    assert len(link_faces(fast, overlap=0.3, shift=1.0)) == 1
    assert len(link_faces(fast, overlap=0.3, shift=0.99)) == 2
    near = [[box(0, 0, 20)], [box(10, 0, 20)]]  # IoU 200 / 600
    assert len(link_faces(near, overlap=0.33, shift=0.0)) == 1
    assert len(link_faces(near, overlap=0.34, shift=0.0)) == 2


def test_the_distance_counts_in_widths_of_the_narrower_box() -> None:
    grown = [[box(0, 0, 20)], [box(25, 0, 80)]]  # centres (10, 10) and (65, 40): 62.6 apart
    assert len(link_faces(grown, overlap=0.3, shift=3.1)) == 2
    assert len(link_faces(grown, overlap=0.3, shift=3.2)) == 1


def test_the_better_pair_is_linked_first() -> None:
    frames = [[box(0, 0, 20)], [box(8, 0, 20), box(2, 0, 20)]]
    assert link_faces(frames, overlap=0.1, shift=1.0) == [{0: 0, 1: 1}, {1: 0}]


def test_nothing_gives_no_track() -> None:
    assert link_faces([[], []], overlap=0.3, shift=1.0) == link_faces([], overlap=0.3, shift=1.0) == []
