"""GET /: a page to try the model in. Its files come from this server, and it may load nothing else."""

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
_FILES = {  # path -> file in assets/, media type
    "/": ("index.html", "text/html"),
    "/page/app.js": ("app.js", "text/javascript"),
    "/page/style.css": ("style.css", "text/css"),
}


def add_web_page(app: FastAPI) -> None:
    """Add the routes of the page's files."""
    for path, (name, media_type) in _FILES.items():
        content = (files(__package__) / "assets" / name).read_bytes()

        async def send_file(content: bytes = content, media_type: str = media_type) -> Response:
            return Response(content, headers=_HEADERS, media_type=media_type)

        app.add_api_route(path, send_file, methods=["GET", "HEAD"], include_in_schema=False)
