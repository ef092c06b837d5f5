"""A server that speaks openpi's protocol, as an episode sees a policy server: its policy can drive, and be evaluated.

    openpi://HOST:PORT
    "openpi://HOST:PORT?agentview=cameras/front&robot0_eye_in_hand=&gripper=policy"

After the question mark is said what is different from what is taken for granted (robot_client/openpi_dialect.py):
camera, state or prompt = its key in an observation, nothing for what the policy does not read; and gripper = libero or
policy (protos/openpi_codec.py).  How many actions an answer has, where the server does not tell, is found out by asking
once, about a black picture.  A policy that takes another's place in an episode is a bad answer.

There are no tokens, log-probabilities or sampling, nothing is stored, and the version is 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar, get_args
from urllib.parse import parse_qsl, urlsplit

import grpc
import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus, WebSocketException

from protos import episode_pb2
from protos.channel import Credentials, endpoint, is_loopback
from protos.codec import CodecError, ImageFormat
from protos.openpi_codec import DEFAULT_OPENPI_PORT, Gripper, pack, unpack
from robot_client.answer import Answer
from robot_client.arm import ArmSpec, Observation, Outcome
from robot_client.backoff import persist
from robot_client.client import Opened
from robot_client.errors import (
    OF_CODE,
    BadAnswer,
    BadRequest,
    DeadlineExceeded,
    NotAdmitted,
    Overloaded,
    PolicyError,
    ServerFault,
    ServerLost,
    looked_into,
)
from robot_client.openpi_dialect import Dialect
from robot_client.rollout import Rollout
from robot_client.spec import PolicySpec

T = TypeVar("T")

SCHEME = "openpi"
OF_STATUS: dict[int, type[PolicyError]] = {401: NotAdmitted, 403: NotAdmitted, 429: Overloaded}
"""HTTP status -> why a connection was refused; every other one may be because the server is not ready."""
RETRY = re.compile(r"; try again in (\d+) ms$")
CLOSE_S = 1.0
MAX_ANSWER_BYTES = 4 * 2**20


class OpenpiClient:
    """What episodes use of PolicyClient (robot_client/client.py), by the same laws.  An episode is a connection.

    Raises ValueError for an address that is none, and for credentials that are of no use.
    """

    image_format: ImageFormat = "raw"

    def __init__(
        self,
        address: str,
        *,
        credentials: Credentials | None = None,
        deadline_s: float = 10.0,
        give_up_after_s: float = 60.0,
    ):
        self.address, self._given = parse_address(address)
        self.deadline_s = deadline_s
        self.give_up_after_s = give_up_after_s
        self._credentials = credentials or Credentials()
        self._token = self._credentials.token_for(endpoint(self.address)[0])
        self._tls = self._credentials.tls()
        self._dialect: Dialect | None = None
        self._episodes: dict[str, Connection] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openpi", daemon=True)
        self._thread.start()

    def __enter__(self) -> OpenpiClient:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for episode_id in list(self._episodes):
            self._leave(episode_id)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def spec(self) -> PolicySpec:
        """What the server says about its policy now, or what is taken for granted."""
        self._dialect = self._persist(self._get_acquainted)
        return self._dialect.spec

    def start_episode(self, rollout: Rollout, arm: ArmSpec) -> Opened:
        """Connects.  Raises BadRequest for what the protocol has no place for; a seed changes nothing."""
        for name in ("version", "temperature", "noise_correlation", "lease_id", "session_id"):
            if asked := getattr(rollout, name):
                raise BadRequest(f"openpi's protocol has no place for it, got {asked!r}", field=name)
        if self._dialect is None:
            self.spec()
        connection = self._connection(self._dialect)
        self._persist(lambda: connection.open(self.deadline_s))
        episode_id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        self._episodes[episode_id] = connection
        return Opened(episode_id=episode_id, version=0, seed=0)

    def ask(
        self,
        episode_id: str,
        decision: int,
        observation: Observation,
        executed: Sequence[episode_pb2.Tick] = (),
        *,
        deadline_s: float | None = None,
    ) -> Future[Answer]:
        """One decision, not waited for; a failure is the future's PolicyError.  Cancel it when it comes too late."""
        patience_s = self.deadline_s if deadline_s is None else deadline_s
        return self._begin(self._answer(episode_id, decision, observation, patience_s))

    def end_episode(
        self,
        episode_id: str,
        outcome: Outcome,
        *,
        terminal: bool = False,
        executed: Sequence[episode_pb2.Tick] = (),
        final_observation: Observation | None = None,
        message: str = "",
        give_up_after_s: float | None = None,
    ) -> None:
        """Disconnects; the protocol has no place for anything else."""
        self._leave(episode_id)

    async def _get_acquainted(self) -> Dialect:
        connection = self._connection()
        try:
            dialect = await connection.open(self.deadline_s)
            if self._dialect is not None and self._dialect.agrees_with(dialect):
                return self._dialect
            if dialect.spec.chunk_length:
                return dialect
            # The first answer may take long: a server may compile its model for it.
            return dialect.with_chunks_like(await connection.infer(dialect.black(), self.give_up_after_s))
        finally:
            await connection.close()

    async def _answer(self, episode_id: str, decision: int, observation: Observation, deadline_s: float) -> Answer:
        connection = self._episodes.get(episode_id)
        if connection is None or (dialect := connection.dialect) is None:
            raise BadRequest(f"there is no episode {episode_id!r}", field="episode_id")
        return Answer(
            decision=decision,
            capture_time_ns=observation.capture_time_ns,
            actions_KA=dialect.actions(await connection.infer(dialect.observation(observation), deadline_s)),
            token_ids_N=np.empty(0, np.int32),
            token_logprobs_N=np.empty(0, np.float32),
            version=0,
            temperature=0.0,
            timing=episode_pb2.Timing(),
            arrived_s=time.monotonic(),
        )

    def _connection(self, dialect: Dialect | None = None) -> Connection:
        return Connection(self.address, token=self._token, tls=self._tls, given=self._given, dialect=dialect)

    def _leave(self, episode_id: str) -> None:
        if (connection := self._episodes.pop(episode_id, None)) is not None:
            self._begin(connection.close()).result()

    def _persist(self, attempt: Callable[[], Coroutine[Any, Any, T]]) -> T:
        def once() -> T:
            try:
                return self._begin(attempt()).result()
            except PolicyError as error:
                raise looked_into(error, self.address, self._credentials) from None

        return persist(once, give_up_after_s=self.give_up_after_s)

    def _begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


class Connection:
    """One websocket, opened again when it is lost.  Every method may raise a PolicyError.

    One question at a time: nothing in an answer tells what it answers, and so whoever stops waiting ends the websocket.
    dialect: how to speak to the server, known from before or once it is open; one that answers in its place may state
    no other.  given: as in Dialect.of().
    """

    def __init__(
        self,
        address: str,
        *,
        token: str,
        tls: ssl.SSLContext | None,
        given: Mapping[str, str],
        dialect: Dialect | None = None,
    ):
        self.dialect = dialect
        self._address, self._given = address, given
        self._uri = f"{'wss' if tls else 'ws'}://{address}"
        self._tls = tls
        self._headers = {"Authorization": f"Api-Key {token}"} if token else {}
        self._turn = asyncio.Lock()
        self._socket: ClientConnection | None = None
        self._is_closed = False

    async def open(self, deadline_s: float) -> Dialect:
        """By what the server says first."""
        return await self._in_time(self._open(), deadline_s)

    async def infer(self, observation: Mapping[str, Any], deadline_s: float) -> dict[str, Any]:
        """The answer, arrays and all."""
        return await self._in_time(self._infer(observation), deadline_s)

    async def close(self) -> None:
        self._is_closed = True
        if self._socket is not None:
            await self._socket.close()

    async def _in_time(self, work: Coroutine[Any, Any, T], deadline_s: float) -> T:
        try:
            return await asyncio.wait_for(work, deadline_s)
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"{self._address}: no answer in {deadline_s:g} s") from None

    async def _open(self) -> Dialect:
        with self._typed_errors():
            self._socket = await connect(
                self._uri,
                ssl=self._tls,
                proxy=None if is_loopback(endpoint(self._address)[0]) else True,
                additional_headers=self._headers,
                compression=None,
                max_size=MAX_ANSWER_BYTES,
                ping_interval=None,  # openpi's server is deaf while it computes: deadlines judge it
                close_timeout=CLOSE_S,
            )
        try:
            stated = Dialect.of(understood(await self._exchange(None)), self._given)
            if self.dialect is not None and not self.dialect.agrees_with(stated):
                raise BadAnswer("another policy answers now", field="metadata")
        except PolicyError:
            self._drop()
            raise
        self.dialect = self.dialect or stated
        return self.dialect

    async def _infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        async with self._turn:
            if self._is_closed:
                raise ServerLost(f"{self._address}: the connection was closed")
            if self._socket is None:
                await self._open()
            return understood(await self._exchange(pack(observation)))

    async def _exchange(self, message: bytes | None) -> str | bytes:
        """What the server says next, after the message if there is one.  Whatever goes wrong ends the websocket."""
        assert self._socket is not None
        try:
            with self._typed_errors():
                if message is not None:
                    await self._socket.send(message)
                return await self._socket.recv()
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.transport.abort()
            self._socket = None

    @contextlib.contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except InvalidStatus as error:
            status, said = error.response.status_code, (error.response.body or b"").decode(errors="replace").strip()
            raise OF_STATUS.get(status, ServerLost)(f"{self._address}: HTTP {status}: {said}") from error
        except (OSError, WebSocketException) as error:
            raise ServerLost(f"{self._address}: {str(error) or type(error).__name__}") from error


def parse_address(address: str) -> tuple[str, dict[str, str]]:
    """HOST:PORT (the port defaults to 8000), and what is said after the question mark.  Raises ValueError."""
    parts = urlsplit(address)
    if parts.scheme != SCHEME or not parts.netloc or parts.path.strip("/"):
        raise ValueError(f"an openpi server's address must be openpi://HOST:PORT, got {address!r}")
    host, port = endpoint(parts.netloc if ":" in parts.netloc else f"{parts.netloc}:{DEFAULT_OPENPI_PORT}")
    given = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    if given.get("gripper", "libero") not in get_args(Gripper):
        raise ValueError(f"gripper must be one of {list(get_args(Gripper))}, got {given['gripper']!r}")
    return f"{host}:{port}", given


def understood(said: str | bytes) -> dict[str, Any]:
    """What a server says, flat and with its arrays.  Raises the PolicyError that a text stands for, and BadAnswer.

    A text of ours begins with a gRPC status; of openpi's own server it is a traceback.
    """
    if isinstance(said, bytes):
        try:
            return unpack(said)
        except CodecError as error:
            raise BadAnswer(str(error)) from error
    status, _, sentence = said.partition(": ")
    if status not in grpc.StatusCode.__members__:
        raise ServerFault(said.strip().rpartition("\n")[2])
    hint = RETRY.search(sentence)
    kind = OF_CODE.get(grpc.StatusCode[status].value[0], ServerFault)
    raise kind(sentence, retry_after_s=int(hint[1]) / 1e3 if hint else 0.0)
