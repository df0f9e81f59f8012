"""The page of an engine as an application that a server takes in, with a folder of its own for uploads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from llava.serve.engine import Engine
from llava.serve.keys import KeyRing
from llava.serve.limits import RequestLimits
from llava.serve.uploads import UploadLimits

if TYPE_CHECKING:
    from llava.serve.page.door import PageDoor

FONTS = ("system-ui", "Segoe UI", "Helvetica Neue", "Arial", "DejaVu Sans", "sans-serif")
CLOSED: dict[str, Any] = {  # what Gradio would offer beside the page
    "footer_links": [],
    "run_history": False,
    "show_error": False,
    "ssr_mode": False,
    "mcp_server": False,
    "pwa": False,
    "enable_monitoring": False,
}
MONO = ("ui-monospace", "DejaVu Sans Mono", "Menlo", "Consolas", "monospace")


def open_page(
    engines: Mapping[str, Engine],
    limits: RequestLimits | None = None,
    uploads: UploadLimits | None = None,
    keys: KeyRing | None = None,
    examples: str | Path | None = None,
) -> PageDoor:
    """Give the page behind its door; with keys it asks for the name of one and the key.

    engines, examples: see `build_page`. Uploads go to a folder that is gone at the end.
    """
    limits, uploads = limits or RequestLimits(), uploads or UploadLimits()
    folder = tempfile.TemporaryDirectory(prefix="m2f2-uploads-")
    os.environ |= {"GRADIO_TEMP_DIR": folder.name, "GRADIO_ANALYTICS_ENABLED": "False"}  # read by Gradio alone
    import gradio as gr

    from llava.serve.page.door import PageDoor
    from llava.serve.page.layout import build_page

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with folder:
            yield

    shell = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    page = build_page(engines, uploads, examples, None if keys is None else partial(_may_ask, keys), limits.max_active)
    gr.mount_gradio_app(
        shell,
        page,
        path="/",
        auth=None if keys is None else lambda name, secret: keys.is_of(secret, name),
        auth_message=None if keys is None else "Log in with the name of a key and the key.",
        max_file_size=uploads.max_bytes,
        theme=gr.themes.Base(font=FONTS, font_mono=MONO, primary_hue="slate", secondary_hue="slate"),
        css=_own("page.css"),
        js=_own("page.js"),
        head='<meta name="color-scheme" content="light dark">',
        **CLOSED,
    )
    return PageDoor(shell, limits, page.fns)


def _may_ask(keys: KeyRing, user: str | None) -> bool:
    return user is not None and keys.has(user)


def _own(name: str) -> str:
    return resources.files("llava.serve.page").joinpath(name).read_text("utf-8")
