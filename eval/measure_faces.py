"""How many faces are found, turned, covered and small ones too, how often is there none, and how long does it take?

Where a face is: the largest box of our finder on the unchanged picture, carried over to what is made of it. Found: a
box overlaps it by an IoU of 0.3. Where our finder sees none, any box counts, and nothing is made of the picture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from math import cos, radians, sin
from pathlib import Path
from statistics import median
from typing import TypeAlias

import cv2
import numpy as np
from rich.progress import track

from llava.core.config import parse, setting
from llava.core.runtime import atomic_path
from llava.core.terminal import console, titled_table
from llava.data.faces import FaceBox, FinderConfig, find_faces, iou
from llava.data.frames import open_clip, read_frames
from llava.data.images import list_images, read_image
from llava.data.inputs import NamedImage, is_video
from llava.evaluation.statistics import wilson
from llava.evaluation.tables import run_script
from llava.ops.augment import dead_leaves, power_law_noise
from llava.pipeline.crops import NO_FACE, TURNS, faces_of
from llava.pipeline.settings import FaceSettings

Finder: TypeAlias = Callable[[np.ndarray], list[FaceBox]]
Varied: TypeAlias = tuple[np.ndarray, FaceBox]
Row: TypeAlias = tuple[str, str, str, str, str, str]
HEADS = ("pictures", "variant", "finder", "n", "result", "95 % interval")
LEAST_OVERLAP = 0.3
SMALL = 40  # pixels of the shrunk face's width
AS_IS, UPSIDE_DOWN, QUARTER = "as is", "turned by 180°", "turned by 90°"
SET_UPRIGHT = {QUARTER: 3, UPSIDE_DOWN: 2}  # quarter turns to the left
SAMPLES = "brick grass gravel chelsea coffee coins page text moon retina rocket hubble_deep_field"
FACELESS = {"skimage": tuple(SAMPLES.split(" ")), "sklearn": ("china", "flower")}
SHEET_SIDE, SHEET_CELL, SHEET_FACES = 1920, 274, 48
SHEET_SHARES = (0.08, 0.04, 0.03, 0.02, 0.016, 0.0125)  # face widths in parts of the sheet's side
SEARCHED_SIDES = (640, 960, 1024, 1280, 1920)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is looked at."""

    folders: tuple[str, ...] = setting(help="folders of pictures or clips that show a face", positional=True)
    most: int = setting(600, "pictures of a folder, evenly spread; of a clip, `frames`")
    frames: int = setting(4, "evenly spread frames of a clip")
    timed: int = setting(40, "pictures that each time is the median of")
    output: str = setting("outputs/faces.md", "file for the table")


def main() -> None:
    """Measure; print the rows, and write them as a table as far as they are known."""
    settings = parse(Settings, description=(__doc__ or "").splitlines()[0])
    empty = [folder for folder in settings.folders if next(_pictures(Path(folder), settings), None) is None]
    if empty:
        raise ValueError(f"{empty[0]!r} holds no picture and no clip; give folders that do.")
    rows: list[Row] = []
    parts: list[Callable[[], list[Row]]] = [partial(folder_rows, Path(each), settings) for each in settings.folders]
    parts += [faceless_rows, partial(sheet_rows, settings), partial(time_rows, settings)]
    for measure in parts:
        rows += measure()
        lines = ["| " + " | ".join(row) + " |" for row in (HEADS, ("---",) * len(HEADS), *rows)]
        with atomic_path(settings.output) as staged:
            staged.write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = titled_table("Faces found", *HEADS)
    for row in rows:
        table.add_row(*row)
    console().print(table)


@lru_cache(maxsize=1)
def finders() -> dict[str, Finder]:
    """Give our finder and, where the installed OpenCV still has it, the Haar cascade that was here before."""
    found: dict[str, Finder] = {"MTCNN": find_faces}
    if hasattr(cv2, "CascadeClassifier"):
        from cv2.data import haarcascades

        cascade = cv2.CascadeClassifier(f"{haarcascades}haarcascade_frontalface_default.xml")
        found["Haar"] = partial(_haar_faces, cascade)
    else:
        console().print(f"OpenCV {cv2.__version__} has no Haar cascade; only MTCNN is measured.")
    return found


def variants() -> Mapping[str, Callable[[np.ndarray, FaceBox], Varied]]:
    """Give what is made of a picture with a face at a box, and the box there."""
    tilted = {f"tilted by {angle}°": partial(_tilted, angle=angle) for angle in (15, 30)}
    turned = {QUARTER: partial(_turned, turns=1), UPSIDE_DOWN: partial(_turned, turns=2)}
    return {AS_IS: _same, **tilted, **turned, "lower half covered": _covered, f"face of {SMALL} px": _shrunk}


def folder_rows(folder: Path, settings: Settings) -> list[Row]:
    """Count, by variant and finder, the pictures of a folder whose face is found, and where the eyes lie in its box."""
    found: dict[tuple[str, str], list[bool]] = {}
    eyes = []
    for image in track(_pictures(folder, settings), description=folder.name):
        face = next(iter(find_faces(image)), None)
        if face is None:
            for name, finder in finders().items():
                found.setdefault((AS_IS, name), []).append(bool(finder(image)))
            continue
        eyes.append(_eyes_in_square(face))
        for variant, vary in variants().items():
            for name, hit in _hits(variant, *vary(image, face)):
                found.setdefault((variant, name), []).append(hit)
    rows = [(folder.name, variant, name, *_rate(hits)) for (variant, name), hits in found.items()]
    places = " ".join(f"{value:.2f}" for value in np.median(eyes, axis=0)) if eyes else "none"
    return [*rows, (folder.name, "eyes in the square, x y x y", "MTCNN", str(len(eyes)), places, "")]


def _hits(variant: str, image: np.ndarray, face: FaceBox) -> Iterator[tuple[str, bool]]:
    """Yield by name whether each finder sees a face there, and, of a turned one, whether the rule says how it lies."""
    for name, finder in finders().items():
        yield name, any(iou(each, face) >= LEAST_OVERLAP for each in finder(image))
    if variant in SET_UPRIGHT:
        said = faces_of(NamedImage(name="", pixels=image), FaceSettings(face="largest"))[0].reason
        yield "said to lie so", said == TURNS[SET_UPRIGHT[variant]]


def faceless() -> Iterator[np.ndarray]:
    """Yield 20 pictures without a face: samples of two packages, and textures drawn here."""
    for package, names in FACELESS.items():
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"{package} is missing; its sample pictures are needed: pip install -e '.[eval]'")
        root = Path(spec.submodule_search_locations[0])
        for name in names:
            yield read_image(next(root.rglob(f"{name}.[jp][pn]g")))
    for seed in range(2):
        rng = np.random.default_rng(seed)
        noise = np.clip(128 + 50 * power_law_noise(512, 1.5, rng), 0, 255).astype(np.uint8)
        stripes = np.where(np.arange(512) // (8 + 24 * seed) % 2, 60, 200).astype(np.uint8)
        yield dead_leaves(512, rng)
        yield np.repeat(noise[..., None], 3, axis=2)
        yield np.ascontiguousarray(np.broadcast_to(stripes[:, None, None], (512, 512, 3)))


def faceless_rows() -> list[Row]:
    """Count the pictures without a face in which one is seen; the whole rule looks up to five times."""
    pictures = list(faceless())
    rows = [("no face", AS_IS, name, *_rate([bool(f(i)) for i in pictures])) for name, f in finders().items()]
    said = [faces_of(NamedImage(name="", pixels=image), FaceSettings())[0].reason != NO_FACE for image in pictures]
    return [*rows, ("no face", "any face judged or said to lie", "MTCNN, whole rule", *_rate(said))]


def sheet_rows(settings: Settings) -> list[Row]:
    """Count, by size of the faces and longest side of the search, how many of 48 faces on one sheet are found."""
    rows: list[Row] = []
    for share in track(SHEET_SHARES, description="sheets"):
        sheet, places = _sheet(share, settings)
        for side in SEARCHED_SIDES:
            boxes = find_faces(sheet, FinderConfig(longest_side=side))
            hits = [any(iou(box, place) >= LEAST_OVERLAP for box in boxes) for place in places]
            pixels = f"{100 * share:.3g} % ({share * SHEET_SIDE:.0f} px)"
            rows.append(("sheet", f"{pixels}, searched at {side} px", "MTCNN", *_rate(hits)))
    return rows


def time_rows(settings: Settings) -> list[Row]:
    """Give the median milliseconds per picture, with a face at two sizes, and without one by the whole rule."""
    rows: list[Row] = []
    pictures = list(_pictures(Path(settings.folders[0]), replace(settings, most=settings.timed)))[: settings.timed]
    for side in (640, 1920):
        for name, finder in finders().items():
            rows.append(("with a face", f"ms at {side} px", name, *_median_ms(finder, pictures, side)))
    for name, look in (("MTCNN, one look", find_faces), ("MTCNN, whole rule", _by_rule)):
        rows.append(("no face", f"ms at {SHEET_SIDE} px", name, *_median_ms(look, list(faceless()), SHEET_SIDE)))
    return rows


def _haar_faces(cascade: cv2.CascadeClassifier, image: np.ndarray) -> list[FaceBox]:
    """Look as the product did before: on the picture shrunk to 640 px, faces from a tenth of the shorter side on."""
    scale = min(1.0, 640 / max(image.shape[:2]))
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if scale < 1.0:
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    least = max(1, round(0.1 * min(grey.shape)))
    found = cascade.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=5, minSize=(least, least))
    boxes = [FaceBox(x=int(x), y=int(y), width=int(w), height=int(h), score=0.0) for x, y, w, h in found]
    return [box.moved(0, 0, 1 / scale) for box in boxes]


def _pictures(folder: Path, settings: Settings) -> Iterator[np.ndarray]:
    for clip in sorted(path for path in folder.rglob("*") if path.is_file() and is_video(str(path))):
        yield from (frame.pixels for frame in read_frames(open_clip(clip), settings.frames))
    paths = list_images(folder)
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), settings.most)).round().astype(int))
    yield from (read_image(paths[number]) for number in (chosen if paths else ()))


def _sheet(share: float, settings: Settings) -> tuple[np.ndarray, list[FaceBox]]:
    """Lay 48 faces, of `share` of the side each, on dead leaves; also give where they lie."""
    leaves = dead_leaves(SHEET_SIDE // 4, np.random.default_rng(0))
    sheet, places = cv2.resize(leaves, (SHEET_SIDE, SHEET_SIDE)), []
    for number, image in enumerate(_pictures(Path(settings.folders[0]), replace(settings, most=SHEET_FACES))):
        face = find_faces(image)[0]
        scale = share * SHEET_SIDE / face.width
        small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)[:SHEET_CELL, :SHEET_CELL]
        x, y = number % 7 * SHEET_CELL, number // 7 * SHEET_CELL
        sheet[y : y + small.shape[0], x : x + small.shape[1]] = small
        places.append(face.moved(x, y, scale))
    return sheet, places


def _eyes_in_square(face: FaceBox) -> list[float]:
    """Give x and y of both eyes, in parts of the square around the box."""
    assert face.eyes is not None
    side = max(face.width, face.height)
    left, top = face.x + (face.width - side) / 2, face.y + (face.height - side) / 2
    return [part for x, y in face.eyes for part in ((x - left) / side, (y - top) / side)]


def _median_ms(look: Callable[[np.ndarray], object], images: Sequence[np.ndarray], side: int) -> tuple[str, str, str]:
    milliseconds = []
    for image in images:
        scale = side / max(image.shape[:2])
        sized = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        start = time.perf_counter()
        look(sized)
        milliseconds.append(1000 * (time.perf_counter() - start))
    return str(len(images)), f"{median(milliseconds):.0f}", ""


def _by_rule(image: np.ndarray) -> object:
    return faces_of(NamedImage(name="", pixels=image), FaceSettings())


def _rate(found: list[bool]) -> tuple[str, str, str]:
    rate = wilson(sum(found), len(found))
    return str(rate.n), f"{100 * rate.value:.1f} %", f"{100 * rate.low:.1f} to {100 * rate.high:.1f}"


def _same(image: np.ndarray, box: FaceBox) -> Varied:
    return image, box


def _tilted(image: np.ndarray, box: FaceBox, angle: int) -> Varied:
    """Turn the picture to the left about its centre; the corners are filled by the nearest pixels."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1)
    x, y = box.x + box.width / 2 - width / 2, box.y + box.height / 2 - height / 2
    turn = radians(angle)
    moved_x, moved_y = x * cos(turn) + y * sin(turn) - x, y * cos(turn) - x * sin(turn) - y
    return cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE), box.moved(moved_x, moved_y)


def _turned(image: np.ndarray, box: FaceBox, turns: int) -> Varied:
    for _ in range(turns):
        box, image = box.turned(image.shape[1]), np.rot90(image)
    return np.ascontiguousarray(image), box


def _covered(image: np.ndarray, box: FaceBox) -> Varied:
    """Lay a grey card over the lower half of the face, as a mask would."""
    covered = image.copy()
    covered[box.y + box.height // 2 : box.y + box.height, box.x : box.x + box.width] = 128
    return covered, box


def _shrunk(image: np.ndarray, box: FaceBox) -> Varied:
    scale = min(1.0, SMALL / box.width)
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), box.moved(0, 0, scale)


if __name__ == "__main__":
    run_script(main)
