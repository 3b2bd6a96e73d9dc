"""The web page's files: read once, sent with what browsers are told of them."""

from hashlib import sha256
from importlib.resources import files
from typing import NamedTuple

from aiohttp import ETag, web

from bestroute.gateway.boundary import response_of
from bestroute.gateway.errors import NoSuchPath, fault

SECURITY = {
    # Nothing from elsewhere, nothing written into the page, no text that is taken for markup.
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Headers of all that the page consists of or asks for."""

_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_INDEX = "index.html"


class _File(NamedTuple):
    body: bytes
    content_type: str
    etag: str


class Files:
    """Serves the files in `static`."""

    def __init__(self) -> None:
        self._files = {
            file.name: _read(file.name, file.read_bytes())
            for file in files("bestroute.gateway").joinpath("static").iterdir()
            if file.is_file()
        }

    async def index(self, request: web.Request) -> web.Response:
        """The page."""
        return _sent(request, self._files[_INDEX])

    async def static(self, request: web.Request) -> web.Response:
        """What it consists of."""
        file = self._files.get(request.match_info["name"])
        if file is None:
            return response_of(fault(NoSuchPath("the page has no such file")))
        return _sent(request, file)


def _read(name: str, body: bytes) -> _File:
    kind = _TYPES["." + name.rpartition(".")[2]]
    return _File(body, kind, sha256(body).hexdigest()[:16])


def _sent(request: web.Request, file: _File) -> web.Response:
    known = any(each.value in (file.etag, "*") for each in request.if_none_match or ())
    response = (
        web.Response(status=304, headers=SECURITY)
        if known
        else web.Response(
            body=file.body, content_type=file.content_type, charset="utf-8", headers=SECURITY
        )
    )
    # Kept, but asked about each time, so that page and server are of the same version.
    response.headers["Cache-Control"] = "no-cache"
    response.etag = ETag(file.etag)
    return response
