"""How a route reads a body of a given kind."""

from fastapi import FastAPI
from starlette.testclient import TestClient

from opt_megatron.serving.app import add_error_handlers


def post(kind, body):
    """The response of a route that takes this kind of body, and the body as the route gets it (None if refused)."""
    app = FastAPI()
    add_error_handlers(app)
    read = [None]

    @app.post("/")
    async def route(body: kind) -> None:
        read[0] = body

    response = TestClient(app).post("/", content=body, headers={"Content-Type": "application/json"})
    return response, read[0]


def read(kind, body):
    response, parsed = post(kind, body)
    assert response.status_code == 200, response.text
    return parsed


def refused(kind, body):
    """The error of a body that is refused."""
    response, _ = post(kind, body)
    assert response.status_code == 400 and set(response.json()) == {"error"}
    assert response.content.isascii() and len(response.content) < 500
    return response.json()["error"]
