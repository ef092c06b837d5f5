"""The openpi door: robots that speak openpi's protocol share the batcher with all others.

    server   the metadata: what GetSpec tells, as plain values; "keys", where an observation has what; "gripper"
    robot    an observation: a dict, packed as in protos/openpi_codec.py
    server   the answer: "actions" (K, A), "version", "policy_timing", "server_timing"; or, as text, one sentence that
             begins with a gRPC status and names the key at fault: the connection goes on
    robot    the next observation ...

Nothing in it opens or ends an episode, or tells what was executed.  A connection is an episode from its first
observation on: greedy, of the version that is live then.  It ends as an error, for nobody knows how it ended.  When it
is closed for being silent, the next observation begins another, where the robot's token still lets it in.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from aiohttp import WSCloseCode, WSMessage, WSMsgType, web
from aiohttp.log import ws_logger
from google.protobuf.message import Message

from policy_server.access import ROBOTS, Guard
from policy_server.calls import Calls, client_at
from policy_server.errors import BadRequest, CannotStart, Forbidden, Overloaded, Refused, Unauthenticated
from policy_server.http import listen
from policy_server.logs import about
from policy_server.observation import MAX_NAME, max_request_bytes
from policy_server.refusals import ids, note, refusals_only
from policy_server.service import PolicyService
from protos import episode_pb2, policy_pb2, tensor_pb2
from protos.codec import CodecError, decode_tensor, encode_image, encode_tensor
from protos.openpi_codec import LIBERO_KEYS, Gripper, libero_gripper, pack, unpack

HEARTBEAT_S = 60.0
"""How often a silent robot is asked whether it is there; it has half as long to answer, since it may be busy."""
UNREAD_S = 30.0
"""How long an answer may wait for a robot that does not read."""
WAITING = 1
"""Observations of one robot between the one that is answered next and the newest, after which no more is read."""
FLUSH_S = 2.0
"""How long the last answers may take to leave when the server stops."""
UNKNOWN = "the connection ended, or was long; openpi's protocol does not tell how the episode did"
ws_logger.setLevel(logging.ERROR)  # its warnings repeat what a robot sent

HTTP_STATUS = {Unauthenticated: 401, Forbidden: 403, Overloaded: 429}
NOT_NOW = 503


class OpenpiDoor:
    """keys: camera, "state" or "prompt" -> its key in an observation, where that is not LIBERO's.

    Raises CannotStart when something that the policy reads has no key.
    """

    def __init__(
        self,
        service: PolicyService,
        spec: policy_pb2.PolicySpec,
        *,
        keys: Mapping[str, str],
        gripper: Gripper,
        guard: Guard,
        calls: Calls,
    ):
        self._service, self._guard, self._calls = service, guard, calls
        self._max_bytes = max_request_bytes(spec)
        self._dialect = Dialect(spec, keys=keys, gripper=gripper)
        self._connections: set[Connection] = set()

    async def start(self, host: str, port: int) -> int:
        """Listens; gives the port.  Raises CannotStart when that cannot be had."""
        application = web.Application()
        application.add_routes([web.get("/healthz", self._healthz), web.get("/{path:.*}", self._connect)])
        self._runner, port = await listen(application, host=host, port=port, tls=self._guard.tls)
        return port

    async def stop(self) -> None:
        """Lets the last answers leave and ends the connections; the service takes nothing new by now."""
        await asyncio.gather(*(connection.stop() for connection in self._connections))
        await self._runner.cleanup()

    async def _healthz(self, request: web.Request) -> web.Response:
        try:
            self._service.check()
        except Refused as refused:
            return _refusal(refused)
        return web.Response(text="OK\n")

    async def _connect(self, request: web.Request) -> web.StreamResponse:
        """A connection counts as a call that its client has under way."""
        client = client_at(request.remote or "")
        admit = functools.partial(self._guard.check, request.headers.get("Authorization"), ROBOTS)
        with about(peer=request.remote):
            try:
                with self._service.metrics.door():
                    if "Origin" in request.headers:  # a page that somebody's browser shows is no robot
                        raise Forbidden("only robots are let in, got a browser")
                    admit()
                    self._service.check()
                    self._calls.enter(client)
            except Refused as refused:
                note(refused)
                return _refusal(refused)
            try:
                return await self._serve(request, client, admit)
            finally:
                self._calls.leave(client)

    async def _serve(self, request: web.Request, client: str, admit: Callable[[], None]) -> web.StreamResponse:
        socket = web.WebSocketResponse(
            heartbeat=HEARTBEAT_S, timeout=FLUSH_S, max_msg_size=self._max_bytes, compress=False
        )
        try:
            await socket.prepare(request)
        except ValueError:  # its headers are bytes
            raise web.HTTPBadRequest(text="must be a websocket's request\n") from None
        connection = Connection(request, socket, self._service, self._dialect, client=client, admit=admit)
        self._connections.add(connection)
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)
        return socket


class Connection:
    """One robot's.  Its observations are answered in their order: nothing in an answer tells which one it answers.

    admit() raises Refused when the robot may begin no more episodes.
    """

    def __init__(
        self,
        request: web.Request,
        socket: web.WebSocketResponse,
        service: PolicyService,
        dialect: Dialect,
        *,
        client: str,
        admit: Callable[[], None],
    ):
        self._request, self._socket, self._client, self._admit = request, socket, client, admit
        self._service, self._dialect = service, dialect
        self._replies: asyncio.Queue[asyncio.Task[bytes | str]] = asyncio.Queue(WAITING)
        self._opening = asyncio.Lock()
        self._episode_id, self._due = "", 0

    async def serve(self) -> None:
        """Until the robot leaves, or stop()."""
        under_way: set[asyncio.Task[Any]] = {asyncio.create_task(self._write())}
        try:
            await self._send(pack(self._dialect.metadata(self._service.spec())))
            async for message in self._socket:
                if message.type is WSMsgType.ERROR:  # too large, or no websocket's: aiohttp has told the robot
                    break
                task = asyncio.create_task(self._reply(message))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                del message  # only the task has it, for as long as the answer needs it
                await self._replies.put(task)
        finally:
            for task in under_way:
                task.cancel()
            await self._end()

    async def stop(self) -> None:
        """Lets the last answers leave, and tells the robot that the server goes away."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._replies.join(), FLUSH_S)
        await self._socket.close(code=WSCloseCode.GOING_AWAY, message=b"the server is stopping")

    async def _write(self) -> None:
        while True:
            await self._send(await (await self._replies.get()))
            self._replies.task_done()

    async def _send(self, said: bytes | str) -> None:
        hang_up = asyncio.get_running_loop().call_later(UNREAD_S, self._hang_up)
        try:
            await (self._socket.send_str(said) if isinstance(said, str) else self._socket.send_bytes(said))
        except ConnectionError:  # it has left, or was cut off: serve() is told
            pass
        finally:
            hang_up.cancel()

    def _hang_up(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()

    async def _reply(self, message: WSMessage) -> bytes | str:
        arrived_s = time.monotonic()
        with contextlib.ExitStack() as line:
            try:
                with refusals_only():
                    request = await self._asked(message)
                    del message  # it may be large, and its answer may take long
                    line.enter_context(about(**ids(request)))
                    reply = await self._answer(request)
                    return pack(self._dialect.answer(reply.chunk, served_s=time.monotonic() - arrived_s))
            except Refused as refused:
                note(refused)
                return self._dialect.sentence(refused)

    async def _asked(self, message: WSMessage) -> policy_pb2.ActRequest:
        """Raises Refused."""
        observation = self._seen(message)
        episode_id = await self._episode(observation)
        decision, self._due = self._due, self._due + 1
        return policy_pb2.ActRequest(episode_id=episode_id, decision=decision, observation=observation)

    def _seen(self, message: WSMessage) -> episode_pb2.Observation:
        """Raises BadRequest."""
        try:
            if message.type is not WSMsgType.BINARY:
                raise BadRequest("must be binary, got text", field="message")
            return self._dialect.observation(message.data)
        except Exception:
            with self._service.metrics.request("act"):  # it does not come to the service, which counts all others
                raise

    async def _answer(self, request: policy_pb2.ActRequest) -> policy_pb2.ActReply:
        """Raises Refused."""
        try:
            return await self._service.answer(request)
        except Refused:
            if self._due == request.decision + 1:  # the next observation is for the same decision
                self._due = request.decision
            raise

    async def _episode(self, observation: episode_pb2.Observation) -> str:
        async with self._opening:
            if self._service.is_open(self._episode_id) and self._service.is_full(self._episode_id):
                await self._end()
            if not self._service.is_open(self._episode_id):
                with self._service.metrics.door():
                    self._admit()
                task = observation.instruction[:MAX_NAME]
                request = policy_pb2.StartEpisodeRequest(purpose="PURPOSE_DEPLOY", task=task, arm="openpi")
                opened = await self._service.start(request, client=self._client)
                self._episode_id, self._due = opened.episode_id, 0
            return self._episode_id

    async def _end(self) -> None:
        if self._service.is_open(self._episode_id):
            with contextlib.suppress(Refused):  # a full disk: the log says so
                outcome = episode_pb2.OUTCOME_ERROR
                await self._service.end(
                    policy_pb2.EndEpisodeRequest(episode_id=self._episode_id, outcome=outcome, message=UNKNOWN)
                )


class Dialect:
    """From openpi's words to ours and back, for one policy."""

    def __init__(self, spec: policy_pb2.PolicySpec, *, keys: Mapping[str, str], gripper: Gripper):
        images, state = [image.name for image in spec.images], ["state"] * bool(spec.state)
        reads, known = [*images, *state, "prompt"], {**LIBERO_KEYS, **keys}
        if wrong := sorted({*reads} - {*known} | {*keys} - {*reads}):
            raise CannotStart(f"openpi_keys must be of what the policy reads, {reads}, and of all of it: see {wrong}")
        self._images = {name: known[name] for name in images}
        self._state = known["state"] if state else None
        self._prompt = known["prompt"]
        self._says = {"keys": {what: known[what] for what in reads}, "gripper": gripper}
        self._fields = {f"observation.images[{name}]": key for name, key in self._images.items()}
        self._fields |= {"observation.state": known["state"], "observation.instruction": self._prompt}
        numbers = [dimension.name for dimension in spec.action]
        self._gripper = numbers.index("gripper") if gripper == "libero" and "gripper" in numbers else None

    def metadata(self, spec: policy_pb2.PolicySpec) -> dict[str, Any]:
        """What a robot is told before it asks."""
        said = plain(spec)
        if self._gripper is not None:
            said["action"][self._gripper].update(low=-1.0, high=1.0)
        return {**said, **self._says}

    def observation(self, data: bytes) -> episode_pb2.Observation:
        """Raises BadRequest.  What is in images and state is judged where everybody's is."""
        try:
            said = unpack(data)
        except CodecError as error:
            raise BadRequest(str(error).removeprefix(f"{error.field}: "), field=error.field) from error
        prompt = _entry(said, self._prompt)
        if not isinstance(prompt, str):
            raise BadRequest(f"must be text, got {_kind(prompt)}", field=self._prompt)
        return episode_pb2.Observation(
            images={name: _image(_entry(said, key), key) for name, key in self._images.items()},
            state=_state(_entry(said, self._state), self._state) if self._state is not None else None,
            instruction=prompt,
        )

    def answer(self, chunk: episode_pb2.Chunk, *, served_s: float) -> dict[str, Any]:
        """served_s: since the observation has arrived."""
        actions_KA = decode_tensor(chunk.actions).copy()
        if self._gripper is not None:
            actions_KA[:, self._gripper] = libero_gripper(actions_KA[:, self._gripper])
        timing = plain(chunk.timing)
        return {
            "actions": actions_KA,
            "version": chunk.version,
            "policy_timing": {"infer_ms": timing["vision_ms"] + timing["prefill_ms"] + timing["decode_ms"]},
            "server_timing": {"infer_ms": 1e3 * served_s, **timing},
        }

    def sentence(self, refused: Refused) -> str:
        """The refusal as text; the field at fault goes by the robot's own name of it."""
        field = self._fields.get(refused.field, refused.field)
        hint = f"; try again in {refused.retry_after_ms} ms" if refused.retry_after_ms else ""
        return ": ".join(filter(None, (refused.status.name, field, str(refused)))) + hint


def plain(value: Any) -> Any:
    """A message as dicts, lists, text and numbers."""
    if isinstance(value, tensor_pb2.Tensor):
        return decode_tensor(value).tolist()
    if isinstance(value, Message):
        return {field.name: plain(getattr(value, field.name)) for field in value.DESCRIPTOR.fields}
    if isinstance(value, str | int | float):
        return value
    return [plain(item) for item in value]


def _entry(said: Mapping[str, Any], key: str) -> Any:
    if key not in said:
        raise BadRequest(f"must be there, got {sorted(said)!r:.300}", field=key)
    return said[key]


def _image(pixels: Any, key: str) -> tensor_pb2.Image:
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise BadRequest(f"must be uint8 (H, W, 3) or (3, H, W), got {_kind(pixels)}", field=key)
    first, last = pixels.shape[0] == 3, pixels.shape[2] == 3
    if first == last:
        raise BadRequest(f"must have 3 colours on its first or on its last axis, got {pixels.shape}", field=key)
    return encode_image(np.moveaxis(pixels, 0, 2) if first else pixels)


def _state(numbers: Any, key: str) -> tensor_pb2.Tensor:
    if not isinstance(numbers, np.ndarray) or numbers.dtype.kind not in "fiu":
        raise BadRequest(f"must be an array of numbers, got {_kind(numbers)}", field=key)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused for it
        return encode_tensor(numbers.astype(np.float32))


def _kind(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def _refusal(refused: Refused) -> web.Response:
    return web.Response(status=HTTP_STATUS.get(type(refused), NOT_NOW), text=f"{refused}\n")
