"""The API's documentation at /docs, for programmers to read and to try; drawn by Swagger UI, nothing from elsewhere."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

FILES = "/swagger"
OPEN_PATHS = ("/docs", "/openapi.json", *(f"{FILES}/swagger-ui{end}" for end in ("-bundle.js", ".css")))


def add_documentation(app: FastAPI) -> None:
    """Add /docs to an application made with `docs_url=None`; FastAPI's own loads its script from another site."""
    app.mount(FILES, StaticFiles(packages=[("fastapi_swagger", "resources")]))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=f"{app.title}: the API",
            swagger_js_url=OPEN_PATHS[2].lstrip("/"),
            swagger_css_url=OPEN_PATHS[3].lstrip("/"),
            swagger_favicon_url="data:,",
        )
