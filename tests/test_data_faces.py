"""The finder: crowds, landmarks, turned, small and cut faces, and nothing where there is no face."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.data.faces import FaceBox, find_faces, has_plausible_landmarks, is_sure
from llava.data.images import read_image
from llava.data.inputs import NamedImage
from llava.ops.augment import dead_leaves
from llava.pipeline.crops import CUT_OFF, NO_FACE, TURNS, Face, faces_of
from llava.pipeline.settings import FaceSettings

DEMO = Path(__file__).parents[1] / "utils" / "demo_faces"
# Pupils in grace_hopper.jpg, read off an enlarged print; (x, y) in pixels.
GRACE_HOPPERS_EYES = ((223.6, 190.4), (307.0, 187.4))


@pytest.fixture(scope="module")
def hopper() -> np.ndarray:
    return read_image(DEMO / "grace_hopper.jpg")


def judged(pixels: np.ndarray, **settings: object) -> list[Face]:
    return faces_of(NamedImage(name="photo", pixels=np.ascontiguousarray(pixels)), FaceSettings(**settings))


def test_landmarks_lie_on_the_eyes_and_give_the_roll(hopper: np.ndarray) -> None:
    (face,) = find_faces(hopper)
    assert face.eyes is not None and np.allclose(face.eyes, GRACE_HOPPERS_EYES, atol=8)
    assert face.roll == pytest.approx(-2.1, abs=3) and is_sure(face)
    (place,) = (found.place for found in judged(hopper))
    assert place["face_landmarks"] == face.landmarks and place["face_roll"] == face.roll


def test_a_crowd_of_48_is_found(hopper: np.ndarray) -> None:
    face = Image.fromarray(hopper[90:370, 130:410]).resize((125, 125))  # the face is 8 % of 1000 wide
    crowd = Image.new("RGB", (1000, 1000), "grey")
    for number in range(48):
        crowd.paste(face, (number % 7 * 140 + 5, number // 7 * 140 + 5))
    assert len(find_faces(np.asarray(crowd))) == 48
    faces = judged(np.asarray(crowd))
    assert [(face.number, face.count, face.pixels is None) for face in faces] == [(n, 48, False) for n in range(1, 49)]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_face_on_its_side_is_said_to_be(hopper: np.ndarray, turns: int) -> None:
    (face,) = judged(np.rot90(hopper, turns))  # turned to the left, so the rest of a full turn sets it upright
    assert face.pixels is None and face.reason == TURNS[4 - turns] and face.box is not None
    (box,) = find_faces(hopper)
    for step in range(turns):
        box = box.turned(hopper.shape[1 - step % 2])
    assert np.allclose(face.box.landmarks, box.landmarks, atol=6)
    assert abs(face.box.roll - (box.roll or 0)) < 3


@pytest.mark.parametrize("name", sorted(path.name for path in DEMO.glob("*.[jp][pn]g")))
def test_a_face_upside_down_is_not_taken_for_an_upright_one(name: str) -> None:
    """In three of the four the nets see an upright face, with the eyes at the mouth."""
    face = read_image(DEMO / name)
    assert [each.reason for each in judged(face)] == [""]
    assert {each.reason for each in judged(np.rot90(face, 2))} == {TURNS[2]}
    assert judged(np.rot90(face, 2), face="largest")[0].pixels is None


def test_of_two_faces_on_their_side_each_is_said_to_be(hopper: np.ndarray) -> None:
    both = judged(np.rot90(np.concatenate([hopper, hopper], axis=1)))
    assert [(face.number, face.count, face.reason) for face in both] == [(1, 2, TURNS[3]), (2, 2, TURNS[3])]


def test_a_small_face_is_said_to_be_with_its_pixels(hopper: np.ndarray) -> None:
    small = np.asarray(Image.fromarray(hopper).resize((77, 90)))
    (face,) = judged(small)
    assert face.pixels is None and face.box is not None
    assert f"too small: {face.box.width} x {face.box.height} pixels" in face.reason
    assert judged(small, least_face=20)[0].pixels is not None


def test_a_face_cut_by_the_border_is_said_to_be(hopper: np.ndarray) -> None:
    # Left out: the right, left, lower and upper part, with landmarks; then the forehead, with all landmarks there.
    for cut in (hopper[:, :320], hopper[:, 220:], hopper[:265], hopper[170:], hopper[142:]):
        (face,) = judged(cut)
        assert face.pixels is None and face.reason == CUT_OFF and face.box is not None
    (edge,) = judged(read_image(DEMO / "astronaut.png")[:, :-245])  # 79 % of the box is there, a landmark is not
    assert edge.pixels is None and edge.reason == CUT_OFF
    tight = judged(hopper[142:345, 160:360])  # as much is missing of a face crop, which is judged whole
    assert [face.pixels.shape[:2] for face in tight if face.pixels is not None] == [(203, 200)]


def test_a_box_beyond_the_border_counts_what_lies_inside() -> None:
    box = FaceBox(x=-30, y=0, width=60, height=80, score=1.0).clipped(100, 100)
    assert box is not None and (box.x, box.width, box.inside) == (0, 30, 0.5)
    assert FaceBox(x=-30, y=0, width=20, height=20, score=1.0).clipped(100, 100) is None


@pytest.mark.parametrize("seed", range(4))
def test_walls_and_textures_are_no_faces(seed: int) -> None:
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)
    wall = np.full((200, 300, 3), 40 * seed, np.uint8)
    for picture in (dead_leaves(256, rng), noise, wall):
        assert find_faces(picture) == []
        assert [face.reason for face in judged(picture)] == [NO_FACE]


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (19, 400), (20, 20), (21, 2000), (33, 47)])
def test_odd_sizes_are_no_error(shape: tuple[int, int]) -> None:
    assert find_faces(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)) == []


def test_the_finder_is_the_same_in_any_thread_and_leaves_the_generators_alone(hopper: np.ndarray) -> None:
    state = np.random.get_state()[1].copy()
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(find_faces, [hopper] * 4))
    assert all(each == found[0] for each in found) and (np.random.get_state()[1] == state).all()
    assert pickle.loads(pickle.dumps(found[0])) == found[0] and pickle.loads(pickle.dumps(find_faces)) is find_faces


def test_landmarks_in_disorder_are_no_face() -> None:
    marks = ((30.0, 40.0), (70.0, 40.0), (50.0, 60.0), (35.0, 80.0), (65.0, 80.0))
    face = FaceBox(x=0, y=0, width=100, height=120, score=1.0, landmarks=marks)
    assert has_plausible_landmarks(face)
    for wrong in ((marks[1], marks[0], *marks[2:]), (*marks[:2], (50.0, 20.0), *marks[3:]), ()):
        assert not has_plausible_landmarks(FaceBox(x=0, y=0, width=100, height=120, score=1.0, landmarks=wrong))
