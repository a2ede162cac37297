"""The HTTP side: a page, and five addresses behind it.

    GET    /                    the page
    GET    /model               what can be asked for
    POST   /images              a request in, its progress out: a line of JSON for each change
    GET    /images/ID/FILE      what was made: grid.png, cells.png, settings.yaml, head_load.json
    DELETE /images/ID           cancel

Whoever closes the connection of a POST cancels it too.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..common.errors import UserError
from .jobs import FINISHED, Job, JobQueue, QueueFull
from .service import ImageService

PAGE = Path(__file__).parent / "page"
LARGEST_REQUEST = 1 << 16  # bytes
SECONDS_BETWEEN_SIGNS_OF_LIFE = 15  # proxies close connections that are silent for a minute
MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".yaml": "text/plain; charset=utf-8",
               ".json": "application/json"}  # fmt: skip
# Everything comes from this server; no other page may embed or read it.
HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Server(uvicorn.Server):
    """Serves :func:`create_app`; told to end, it first cancels all jobs, so that streams end."""

    def __init__(self, service: ImageService, allowed_hosts: list[str]):
        self.jobs = JobQueue(service.make, service.config.max_waiting)
        settings = uvicorn.Config(
            create_app(service, self.jobs, allowed_hosts),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        super().__init__(settings)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self.jobs.close)
        await super().shutdown(sockets)


def create_app(service: ImageService, jobs: JobQueue, allowed_hosts: list[str]) -> Starlette:
    """The application for a service.

    Args:
        service: knows what may be asked.
        jobs: makes it.
        allowed_hosts: names in the ``Host`` header that are answered, ``*`` for any. A page that
            listens on this machine alone answers to this machine's names alone, so that no other
            site's name can be pointed at it.
    """

    async def page(request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    async def model(request: Request) -> Response:
        return JSONResponse(service.describe())

    async def make(request: Request) -> Response:
        settings = service.read(await read_json(request))
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the server has stopped meanwhile
                loop.call_soon_threadsafe(changed.set)

        job = Job(settings, tell)
        jobs.submit(job)
        return StreamingResponse(follow(job, changed), media_type="application/x-ndjson",
                                 headers={"x-accel-buffering": "no"})  # fmt: skip

    async def follow(job: Job, changed: asyncio.Event) -> AsyncIterator[str]:
        """The news of a job as they come; a slow reader gets the latest only."""
        try:
            while True:
                changed.clear()
                state = job.state
                yield json.dumps({"id": job.id, **state}) + "\n"
                if state["status"] in FINISHED:
                    return
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(changed.wait(), SECONDS_BETWEEN_SIGNS_OF_LIFE)
        finally:
            jobs.cancel(job)  # nobody listens any more; no matter if it is done

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        content = find(request).files.get(name)
        if content is None:
            raise HTTPException(404, f"there is no {name} of these images")
        return Response(content, media_type=MEDIA_TYPES[Path(name).suffix])

    async def cancel(request: Request) -> Response:
        jobs.cancel(find(request))
        return Response(status_code=204)

    def find(request: Request) -> Job:
        if (job := jobs.find(request.path_params["id"])) is None:
            raise HTTPException(404, "these images are gone; make them again")
        return job

    return Starlette(
        routes=[
            Route("/", page),
            Route("/model", model),
            Route("/images", make, methods=["POST"]),
            Route("/images/{id}", cancel, methods=["DELETE"]),
            Route("/images/{id}/{name}", file),
            Mount("/page", StaticFiles(directory=PAGE)),
        ],
        middleware=[
            Middleware(with_headers),
            Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts),
        ],
        exception_handlers={UserError: say_what_is_wrong, HTTPException: say_what_is_wrong},
    )


async def read_json(request: Request) -> Any:
    """The body of a request.

    Raises:
        HTTPException: unless it is JSON of reasonable size. Its content type is asked for because
            a browser lets no other site send that one without this server's consent.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "a request is JSON: content-type: application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_REQUEST:
            raise HTTPException(413, f"a request has at most {LARGEST_REQUEST} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the request is not valid JSON") from None


async def say_what_is_wrong(request: Request, error: Exception) -> Response:
    """``{"error": "one line"}``, whatever the mistake."""
    status, text = 400, str(error)
    if isinstance(error, HTTPException):
        status, text = error.status_code, error.detail
    elif isinstance(error, QueueFull):
        status = 503
    return JSONResponse({"error": text}, status)


def with_headers(app: ASGIApp) -> Callable[[Scope, Receive, Send], Any]:
    """Put ``HEADERS`` on every response."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await app(scope, receive, send_more)

    return answer
