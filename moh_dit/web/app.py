"""Serve the page and its HTTP interface.

    GET    /                    the page
    GET    /model               classes, schedulers, defaults and limits, as JSON
    GET    /first               a grid of samples that came with the model, if there is one
    POST   /images              sample images; streams the progress as lines of JSON
    GET    /images/ID/FILE      results: grid.png, cells.png, settings.yaml, head_load.json
    DELETE /images/ID           cancel

Closing the connection of a POST cancels its job, too.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from ..common.errors import UserError
from .job_queue import FINISHED, Job, JobQueue, QueueFull
from .service import ImageService

PAGE = Path(__file__).parent / "page"
MAX_REQUEST_BYTES = 1 << 16
SECONDS_TO_UPLOAD = 10
KEEP_ALIVE_SECONDS = 15  # proxies close connections that are silent for a minute
MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".yaml": "text/plain; charset=utf-8",
               ".json": "application/json"}  # fmt: skip
CLOSE = {"connection": "close"}
# Headers of every response. The browser may load resources only from this server, and other pages
# may not embed this one.
HEADERS = [
    ("content-security-policy", "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; "
     "base-uri 'none'; form-action 'none'"),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cache-control", "no-store"),
]  # fmt: skip


class Server(uvicorn.Server):
    """Serves :func:`create_app`. On shutdown it first cancels all jobs, so that streams end."""

    def __init__(self, service: ImageService, allowed_hosts: list[str]):
        self.jobs = JobQueue(service.run_job, service.config.max_waiting)
        settings = uvicorn.Config(
            create_app(service, self.jobs, allowed_hosts),
            log_level="warning",
            access_log=False,
            server_header=False,
            headers=HEADERS,
            timeout_graceful_shutdown=5,
        )
        super().__init__(settings)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self.jobs.close)
        await super().shutdown(sockets)


def create_app(service: ImageService, jobs: JobQueue, allowed_hosts: list[str]) -> Starlette:
    """Create the application.

    Args:
        service: checks requests and describes the model.
        jobs: runs the jobs.
        allowed_hosts: accepted names in the ``Host`` header, ``*`` for any. A server on the
            loopback address accepts only its own names, so that a site whose domain name resolves
            to this machine cannot read the page (DNS rebinding).
    """

    async def page(request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    async def model(request: Request) -> Response:
        return JSONResponse(service.model_info())

    async def first(request: Request) -> Response:
        if service.first_picture is None:
            raise HTTPException(404, "this model came without samples")
        return FileResponse(service.first_picture)

    async def make(request: Request) -> Response:
        try:
            settings = service.parse_request(await read_json(request))
        except ClientDisconnect:  # nobody waits for an answer
            return Response(status_code=400)
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop may have stopped
                loop.call_soon_threadsafe(changed.set)

        job = Job(settings, notify)
        jobs.submit(job)
        return StreamingResponse(stream_states(job, changed), media_type="application/x-ndjson",
                                 headers={"x-accel-buffering": "no"})  # fmt: skip

    async def stream_states(job: Job, changed: asyncio.Event) -> AsyncIterator[str]:
        """Yield each state of a job as a line; a slow reader gets only the latest state."""
        try:
            while True:
                changed.clear()
                state = job.state
                yield json.dumps({"id": job.id, **state}) + "\n"
                if state["status"] in FINISHED:
                    return
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(changed.wait(), KEEP_ALIVE_SECONDS)
        finally:
            jobs.cancel(job)  # the client has disconnected; no effect on a finished job

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        content = find_job(request).files.get(name)
        if content is None:
            raise HTTPException(404, f"these images have no file {name}")
        return Response(content, media_type=MEDIA_TYPES[Path(name).suffix])

    async def cancel(request: Request) -> Response:
        jobs.cancel(find_job(request))
        return Response(status_code=204)

    def find_job(request: Request) -> Job:
        if (job := jobs.find(request.path_params["id"])) is None:
            raise HTTPException(404, "these images no longer exist; generate them again")
        return job

    return Starlette(
        routes=[
            Route("/", page),
            Route("/model", model),
            Route("/first", first),
            Route("/images", make, methods=["POST"]),
            Route("/images/{id}", cancel, methods=["DELETE"]),
            Route("/images/{id}/{name}", file),
            Mount("/page", StaticFiles(directory=PAGE)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts)],
        exception_handlers={UserError: error_response, HTTPException: error_response},
    )


async def read_json(request: Request) -> Any:
    """Return the decoded JSON body of a request.

    The content type must be JSON, because browsers do not let other sites send that type without
    this server's consent.

    Raises:
        HTTPException: the body is not JSON, too large, or takes longer than ``SECONDS_TO_UPLOAD``.
        ClientDisconnect: the client closed the connection before the end of the body.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "a request must be JSON, with content-type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS_TO_UPLOAD):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_REQUEST_BYTES:
                    raise HTTPException(413, f"a request has at most {MAX_REQUEST_BYTES} bytes")
    except TimeoutError:
        raise HTTPException(408, "the request did not arrive in time", CLOSE) from None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the request is not valid JSON") from None


async def error_response(request: Request, error: Exception) -> Response:
    """Answer any error with ``{"error": "one line"}``."""
    status, text, headers = 400, str(error), None
    if isinstance(error, HTTPException):
        status, text, headers = error.status_code, error.detail, error.headers
    elif isinstance(error, QueueFull):
        status = 503
    return JSONResponse({"error": text}, status, headers)
