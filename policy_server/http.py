"""The HTTP door: the live page and what it asks for, the metrics, and a health probe.

    /                                the page: index.html, page.css, page.js of page/, and nothing from elsewhere
    /state                           everything about now, as JSON (policy_server/watch.py)
    /robots/EPISODE/frame            the latest frame of an open episode, as JPEG
    /episodes                        the stored episodes, newest first, as JSON; with ?session=ID that session's alone
    /episodes/EPISODE/frames/INDEX   what a stored episode's decision saw, as JPEG
    /metrics                         for Prometheus
    /healthz                         200 while the server serves, 503 otherwise; open to all

    POST /sessions/ID/CONTROL        promote, roll_back, pause, resume or stop, with {"note": "why"} and, for the first
                                     two, "version", the one that it is to befall; for admins

Nothing else can be changed through it.  Pictures are encoded and episodes read in one thread, however many look.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client.exposition import choose_encoder

from policy_server.access import ADMINS, TRAINERS, Guard
from policy_server.calls import ARRIVE_S
from policy_server.errors import (
    BadRequest,
    CannotStart,
    Forbidden,
    OutOfOrder,
    Overloaded,
    Refused,
    Unauthenticated,
    UnknownSession,
)
from policy_server.logs import about
from policy_server.metrics import Metrics
from policy_server.observation import MAX_NAME
from policy_server.refusals import note
from policy_server.sessions import CONTROLS, NO_SESSIONS, Control, Sessions
from policy_server.watch import Watch
from protos.channel import address_of, is_loopback
from protos.codec import CodecError
from protos.episode_file import DamagedEpisode

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
PORT = re.compile(r":\d+$")
NOW = {"Cache-Control": "no-store"}
FOR_GOOD = {"Cache-Control": "private, max-age=86400, immutable"}
NO_HTTP = (HttpProcessingError, web.RequestPayloadError, UnicodeEncodeError)
"""What aiohttp raises for it; the last one where it would repeat bytes that a header holds."""
STATUS: dict[type[Refused], type[web.HTTPException]] = {
    UnknownSession: web.HTTPNotFound,
    OutOfOrder: web.HTTPConflict,
    Overloaded: web.HTTPServiceUnavailable,
}
"""Of what may be wrong with a person's word."""
FLUSH_S = 1.0
"""How long the last replies may take to leave."""

CHALLENGE = {"WWW-Authenticate": 'Basic realm="VLA-RL: any name, and a token of role trainer or admin as password"'}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpDoor:
    """Trainers and admins come in, where the guard asks.  sessions None: this server has none."""

    def __init__(self, watch: Watch, sessions: Sessions | None, metrics: Metrics, *, guard: Guard):
        self._watch, self._sessions, self._metrics, self._guard = watch, sessions, metrics, guard
        self._files = {path: (PAGE / name).read_bytes() for path, (name, _) in FILES.items()}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="http")

    async def start(self, host: str, port: int) -> int:
        """Listens; gives the port.  Raises CannotStart when that cannot be had."""
        self._is_local = is_loopback(host)
        application = web.Application(middlewares=[self._admit])
        application.on_response_prepare.append(_add_headers)
        application.add_routes(
            [
                *(web.get(path, self._file) for path in FILES),
                web.get("/state", self._state),
                web.get("/robots/{episode}/frame", self._frame),
                web.get("/episodes", self._episodes),
                web.get(r"/episodes/{episode}/frames/{index:\d{1,9}}", self._stored_frame),
                *(web.post(f"/sessions/{{session}}/{control}", partial(self._say, control)) for control in CONTROLS),
                web.get("/metrics", self._exposition),
                web.get("/healthz", self._healthz),
            ]
        )
        self._runner, port = await listen(application, host=host, port=port, tls=self._guard.tls)
        self._sampling = asyncio.create_task(self._watch.sample())
        return port

    async def stop(self) -> None:
        """Lets the last replies leave."""
        self._sampling.cancel()
        await self._runner.cleanup()
        self._pool.shutdown()

    @web.middleware
    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == "/healthz":
            return await handler(request)
        # A foreign page whose name was made to resolve to this machine would be let in by a browser.
        if self._is_local and not is_loopback(PORT.sub("", request.host)):
            raise web.HTTPMisdirectedRequest(text="this server is only for its own machine: call it localhost\n")
        try:
            with self._metrics.door():
                roles = ADMINS if request.method == "POST" else TRAINERS
                self._guard.check(request.headers.get("Authorization"), roles)
        except (Unauthenticated, Forbidden) as refused:
            with about(peer=request.remote):
                note(refused)
            if isinstance(refused, Unauthenticated):
                asks = CHALLENGE if request.method == "GET" else None  # else the page asks
                raise web.HTTPUnauthorized(text=f"{refused}\n", headers=asks) from None
            raise web.HTTPForbidden(text=f"{refused}\n") from None
        return await handler(request)

    async def _file(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self._files[request.path],
            content_type=FILES[request.path][1],
            charset="utf-8",
            headers={"Cache-Control": "no-cache"},
        )

    async def _state(self, request: web.Request) -> web.Response:
        return web.json_response(self._watch.state(), headers=NOW)

    async def _episodes(self, request: web.Request) -> web.Response:
        return web.json_response(await self._aside(self._watch.recent, request.query.get("session", "")), headers=NOW)

    async def _say(self, control: Control, request: web.Request) -> web.Response:
        # What a foreign page may send in a browser's name, it may not send as JSON.
        if request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType(text="a person's word comes as application/json\n")
        try:
            said = await request.json()
            note, version = said.get("note", ""), said.get("version")
        except (ValueError, AttributeError):
            raise web.HTTPBadRequest(text='must be a JSON object like {"note": "why"}\n') from None
        if version is not None and type(version) is not int:
            raise web.HTTPBadRequest(text=f"version must be a whole number, got {version!r:.40}\n")
        try:
            if self._sessions is None:
                raise OutOfOrder(NO_SESSIONS)
            session = request.match_info["session"]
            note = str(note)[:MAX_NAME]
            await asyncio.to_thread(self._sessions.control, session, control, note, version=version)
        except (UnknownSession, OutOfOrder, Overloaded) as refused:
            raise STATUS[type(refused)](text=f"{refused}\n") from None
        return web.Response(status=204, headers=NOW)

    async def _frame(self, request: web.Request) -> web.Response:
        return await self._picture(NOW, self._watch.frame, request.match_info["episode"])

    async def _stored_frame(self, request: web.Request) -> web.Response:
        episode, index = request.match_info["episode"], int(request.match_info["index"])
        return await self._picture(FOR_GOOD, self._watch.stored_frame, episode, index)

    async def _exposition(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        body = await self._aside(encode, self._metrics.registry)
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _healthz(self, request: web.Request) -> web.Response:
        trouble = self._watch.trouble
        return web.Response(text=f"{trouble or 'serving'}\n", status=503 if trouble else 200, headers=NOW)

    async def _picture(self, caching: dict[str, str], encode: Callable[..., bytes], *args: Any) -> web.Response:
        try:
            body = await self._aside(encode, *args)
        except (LookupError, OSError, DamagedEpisode, CodecError):
            raise web.HTTPNotFound(text="there is no such frame\n") from None
        return web.Response(body=body, content_type="image/jpeg", headers=caching)

    def _aside(self, work: Callable[..., Any], *args: Any) -> Awaitable[Any]:
        return asyncio.get_running_loop().run_in_executor(self._pool, work, *args)


async def listen(
    application: web.Application, *, host: str, port: int, tls: ssl.SSLContext | None
) -> tuple[web.AppRunner, int]:
    """Serves until the runner's cleanup(); gives the real port.  Raises CannotStart when that cannot be had.

    A connection over which no whole request comes for ARRIVE_S is closed.
    """
    log.addFilter(_is_ours)
    runner = web.AppRunner(
        application, access_log=None, logger=log, keepalive_timeout=ARRIVE_S, shutdown_timeout=FLUSH_S
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=tls).start()
    except OSError as error:
        await runner.cleanup()
        raise cannot_listen(host, port) from error
    return runner, runner.addresses[0][1]


def cannot_listen(host: str, port: int) -> CannotStart:
    """Says why, which not every library does: found out by trying."""
    why = "is another server running there?"
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
    except OSError as error:
        why = why if error.errno == errno.EADDRINUSE else error.strerror
    return CannotStart(f"cannot listen on {address_of(host, port)}: {why}")


def _is_ours(record: logging.LogRecord) -> bool:
    """Notes what is no HTTP as other refusals are: aiohttp shows it, at length, and it may hold a token."""
    if not isinstance(record.exc_info and record.exc_info[1], NO_HTTP):
        return True
    with about(peer=next(iter(record.args or ()), "")):
        note(BadRequest("must be HTTP, got something else"))
    return False


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
