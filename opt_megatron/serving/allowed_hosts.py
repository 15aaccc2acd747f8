"""ASGI middleware: the `Host` of a request must be one of the server's names.

It protects a server that only this machine can reach from DNS rebinding: a page of another site lets its own name
resolve to 127.0.0.1, and its browser then takes this server's responses for that site's. The browser sends the site's
name as `Host`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError


class AllowedHostsMiddleware:
    """Answers 403 to requests for other hosts than `localhost`, addresses of the loopback interface, and those given.

    Args:
        allowed_hosts: without port; `*` takes every request.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Collection[str]) -> None:
        self._app = app
        self._allowed = {"localhost", *(host.lower() for host in allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it (ASGI)."""
        host = dict(scope["headers"]).get(b"host") if scope["type"] == "http" else None
        # HTTP/1.0 has no Host, and load balancers' checks send none. Browsers always do.
        if host is not None and not self._is_allowed(host.decode("latin-1")):
            error = ApiError(
                403,
                f"this server does not answer for the host {ascii(host.decode('latin-1'))[:200]}; "
                "its option --allowed-hosts adds names",
                code="host_not_allowed",
            )
            await error.to_response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        if "*" in self._allowed:
            return True
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:  # brackets that hold no address
            return False
        return name in self._allowed or _is_loopback(name)


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
