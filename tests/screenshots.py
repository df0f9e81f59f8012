"""Draw the page for the documentation: python tests/screenshots.py MODEL_FOLDER [docs/pictures]."""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from browser import Browser, chromium
from PIL import Image
from servers import ROOT, Process, ready_address

from llava.core.runtime import atomic_path

PHOTO = ROOT / "utils" / "demo_faces" / "grace_hopper.jpg"
QUESTION = "Does this image look real or fake? Give the reasons."
LOOKS = {"page-wide": (1280, 1000, False), "page-phone": (390, 844, False), "page-dark": (1280, 1000, True)}


def draw(browser: Browser, address: str, folder: Path) -> None:
    """Ask about a photo in public domain and write the page in each of its looks."""
    for name, (width, height, is_dark) in LOOKS.items():
        browser.look(width, height, is_dark)
        browser.open(address)
        browser.drop(PHOTO)
        browser.wait_for_answer()
        browser.click(QUESTION)
        browser.wait_for_answer(2)
        browser.value("document.activeElement.blur(), scrollTo(0, 0)")
        image = Image.open(io.BytesIO(browser.picture())).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        write(folder / f"{name}.png", image)
        if name == "page-wide":  # down to the words, for the first screen of README.md
            top = browser.value("document.querySelector('#tabs').getBoundingClientRect().top")
            write(folder / "page.png", image.crop((0, 0, image.width, int(top))))


def write(path: Path, image: Image.Image) -> None:
    """Write a PNG file, moved into place complete."""
    with atomic_path(path) as staged:
        image.save(staged, optimize=True)


def main(model: str, folder: str = "docs/pictures") -> None:
    """Serve a model, draw, and end it."""
    with tempfile.TemporaryDirectory() as scratch, chromium(Path(scratch)) as browser:
        flags = ["serve", "--model_path", str(Path(model).resolve()), "--port", "0"]
        server = Process("llava.cli", flags, Path(scratch) / "log")
        try:
            draw(browser, ready_address(server), Path(folder))
        finally:
            server.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
