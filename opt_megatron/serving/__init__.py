"""An HTTP server with OpenAI's completions API on top of the engine, and its page.

The way of a request: `gate` (key, size) -> `app` (routes) -> `protocol` (what may be asked) -> `prompts` (to
engine requests) -> `service` (the thread that runs the engine) -> `answer` (events to choices) -> the client.
Needs the extra `serve`: fastapi, uvicorn, prometheus-client.
"""
