"""GET /: the page. Its three files come from this server, and it may load nothing else."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_FILES = {
    "/": ("index.html", "text/html"),
    "/page/app.js": ("app.js", "text/javascript"),
    "/page/style.css": ("style.css", "text/css"),
}


def add_page(app: FastAPI) -> None:
    """Serve the page's files."""
    for path, (name, kind) in _FILES.items():
        content = (files(__package__) / "assets" / name).read_bytes()

        async def show(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, headers=_HEADERS, media_type=kind)

        app.add_api_route(path, show, methods=["GET", "HEAD"], include_in_schema=False)
