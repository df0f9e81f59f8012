"""A page for people: one HTML file with everything in it, to read, to print and to keep."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from llava.core.runtime import atomic_path


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a page. body: finished HTML, made by `fill` or `figure`; anchor: its id, without spaces."""

    title: str
    body: Markup
    anchor: str


def render_page(
    title: str, sections: Sequence[Section], lead: str | Markup = "", limits: Sequence[str | Markup] = ()
) -> str:
    """Give a whole page: title, lead, sections, and what it can not tell as its last lines.

    It holds style and pictures itself and no script, so it looks the same anywhere and reaches for nothing. Plain
    strings are escaped, Markup is taken as it is.
    """
    return str(fill("page.html", title=title, sections=sections, lead=lead, limits=limits))


def write_page(path: str | Path, page: str) -> None:
    """Write a page into a file that appears complete."""
    with atomic_path(path) as staged:
        staged.write_text(page, encoding="utf-8")


def fill(template: str, **facts: Any) -> Markup:
    """Fill a template of this package. Every value is escaped; one that the template names and is not given raises."""
    return Markup(_environment().get_template(template).render(**facts))


def figure(png: bytes, alt: str, caption: str | Markup = "") -> Markup:
    """Show a PNG picture, embedded. alt: what it shows, for those who do not see it."""
    return fill("figure.html", source=png_uri(png), alt=alt, caption=caption)


def png_uri(png: bytes) -> str:
    """Give a PNG file as a `data:` address."""
    return f"data:image/png;base64,{b64encode(png).decode('ascii')}"


def png_bytes(pixels: np.ndarray) -> bytes:
    """Encode uint8 RGB (H, W, 3) as a PNG file."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    return buffer.getvalue()


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("llava.pipeline", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
