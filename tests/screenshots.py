"""Draw the page for the documentation: python tests/screenshots.py MODEL [docs/pictures]."""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

from browser import Browser, chromium
from PIL import Image
from servers import ROOT, Process, ready_address

from llava.core.config import build, load_yaml
from llava.core.runtime import atomic_path
from llava.jobs.forged_faces import ForgeDataConfig, build_forgeries

# Of the embedded portraits one that is like those the starter knows.
PHOTO = ROOT / "utils" / "demo_faces" / "portrait_cc0_1.png"
NAVY = PHOTO.with_name("grace_hopper.jpg")
QUESTION = "Does this image look real or fake? Give the reasons."
LOOKS = {"page-wide": (1280, 1000, False), "page-phone": (390, 844, False), "page-dark": (1280, 1000, True)}


def draw(browser: Browser, address: str, folder: Path, edited: Path) -> None:
    """Ask about a photo and draw the page in each look, then the verdicts on it and on the edited Navy portrait."""
    for name, (width, height, is_dark) in LOOKS.items():
        browser.look(width, height, is_dark)
        browser.open(address)
        browser.drop(PHOTO)
        browser.wait_for_answer()
        browser.click(QUESTION)
        browser.wait_for_answer(2)
        write(folder / f"{name}.png", [seen(browser)])
    browser.look(1280, 1000)
    strips = []
    for photo in (PHOTO, edited):  # one above the other, for the first screen of README.md
        browser.open(address)
        browser.drop(photo)
        browser.wait_for_answer()
        browser.value("document.querySelectorAll('.verdict ~ *, #clear, #tabs').forEach(e => e.style.opacity = 0)")
        image = seen(browser)
        places = (
            f"document.querySelector('{part}').getBoundingClientRect()" for part in ("#desk", "#photo", ".verdict")
        )
        top, *ends = (
            browser.value(f"{at}.{edge}") for at, edge in zip(places, ("top", "bottom", "bottom"), strict=True)
        )
        strips.append(image.crop((0, int(top) - 16, image.width, int(max(ends)) + 16)))
    write(folder / "verdicts.png", strips)


def seen(browser: Browser) -> Image.Image:
    """Give what the browser shows, from the top, nothing marked."""
    browser.value("document.activeElement.blur(), scrollTo(0, 0)")
    return Image.open(io.BytesIO(browser.picture())).convert("RGB")


def edited_portrait(scratch: Path) -> Path:
    """Edit the Navy portrait as the demonstration does: the only embedded photo that is ever shown forged."""
    (scratch / "navy").mkdir()
    shutil.copy(NAVY, scratch / "navy")
    recipe = load_yaml(ROOT / "scripts" / "configs" / "demo" / "edit.yaml")
    folders = {"photos": str(scratch / "navy"), "output": str(scratch / "edited")}
    build_forgeries(build(ForgeDataConfig, {**recipe, **folders}))
    made = scratch / "edited" / "images" / "train" / "00000_1.png"
    return made.rename(scratch / "grace_hopper, edited.png")


def write(path: Path, images: list[Image.Image]) -> None:
    """Write a PNG file of 256 colours, one image below the other, moved into place complete."""
    whole = Image.new("RGB", (images[0].width, sum(image.height for image in images)))
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    with atomic_path(path) as staged:
        whole.quantize(256, dither=Image.Dither.NONE).save(staged, optimize=True)


def main(model: str, folder: str = "docs/pictures") -> None:
    """Serve a model, draw, and end it."""
    with tempfile.TemporaryDirectory() as scratch, chromium(Path(scratch)) as browser:
        flags = ["serve", "--model_path", str(Path(model).resolve()), "--port", "0"]
        server = Process("llava.cli", flags, Path(scratch) / "log")
        try:
            draw(browser, ready_address(server), Path(folder), edited_portrait(Path(scratch)))
        finally:
            server.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
