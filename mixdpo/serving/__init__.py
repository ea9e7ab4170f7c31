"""Serves a finished run over HTTP. Only this room may import starlette and uvicorn (the extra `serve`)."""
