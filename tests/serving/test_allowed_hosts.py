"""Which values of the header `Host` are taken."""

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from opt_megatron.serving.allowed_hosts import AllowedHostsMiddleware


def status(host: str | None, allowed=()) -> int:
    client = TestClient(AllowedHostsMiddleware(PlainTextResponse("ok"), allowed), base_url="http://localhost")
    request = client.build_request("GET", "/", headers={} if host is None else {"Host": host})
    if host is None:
        del request.headers["host"]
    return client.send(request).status_code


@pytest.mark.parametrize("host", ["localhost", "LocalHost:5000", "127.0.0.1", "127.0.0.2:80", "[::1]:5000", None])
def test_names_of_the_loopback_interface_are_taken(host):
    assert status(host) == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:5000", "localhost.evil.example", "10.0.0.1", "0.0.0.0", "", "[::1", "*", "é"]
)
def test_others_are_refused(host):
    assert status(host.encode("latin-1")) == 403


def test_given_names_are_taken():
    allowed = ("Models.example", "10.0.0.1")
    assert [status(host, allowed) for host in ("models.example:443", "10.0.0.1", "evil.example")] == [200, 200, 403]
    assert status("evil.example", ("*",)) == 200
