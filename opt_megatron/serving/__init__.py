"""An HTTP server: OpenAI's and metaseq's completions API on top of the engine, and a web page.

A request passes these modules in turn:

1. `server`, `connection`: uvicorn, time limits for clients that are slow
2. `middleware`: API key, size and time of the body
3. `app`: the routes
4. `protocol`: the fields of a body, with their ranges
5. `engine_requests`: prompts to token ids and `SamplingParams`
6. `async_engine`, `admission`, `engine_thread`: 429 where too many wait; queue for the thread that runs the engine
7. `choices`, `response`, `streaming`: the engine's events to choices, and to the client

Needs the extra `serve`: fastapi, uvicorn, prometheus-client.
"""
