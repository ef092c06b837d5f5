"""The Policy service: from messages to the batcher and back.

start(), answer(), end() and spec() know nothing of gRPC: the openpi door (policy_server/openpi.py) uses them as well.

One event loop does the network; images are decoded and prepared by a small crew, so that this overlaps with the model,
which runs in the engine's thread.  A call that the client cancels, or whose deadline passes, is cancelled by gRPC: the
last one to leave takes its decision out of the queue before the model sees it, and nothing of it stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from policy_server.act_stream import RobotStream
from policy_server.batcher import Answered, Batcher, DecodeRequest, Ticket
from policy_server.calls import client_of
from policy_server.crew import Crew
from policy_server.episodes import EndedBy, Episode, Episodes, Flight
from policy_server.errors import Abandoned, BadRequest, OutOfOrder, Refused, Superseded
from policy_server.logs import about
from policy_server.metrics import Metrics, counted
from policy_server.observation import (
    MAX_TICKS,
    Observed,
    check_cameras,
    check_choice,
    check_names,
    check_sampling,
    check_ticks,
    max_request_bytes,
    read_observation,
)
from policy_server.refusals import (
    ASLEEP,
    DRAINING,
    STOPPING,
    TURNING_IN,
    Door,
    bare,
    ids,
    note,
    refusals_only,
    refusing,
)
from policy_server.session import Charter
from policy_server.sessions import NO_SESSIONS, Sessions
from policy_server.versions import Versions
from protos import episode_pb2, policy_pb2, policy_pb2_grpc, rollout_pb2
from protos.codec import encode_tensor

log = logging.getLogger(__name__)

Prepare = Callable[[Observed], Any]


class PolicyService(policy_pb2_grpc.PolicyServicer):
    """prepare(observed) runs in one of `preparers` threads; what it returns goes to the model as it is."""

    def __init__(
        self,
        *,
        spec: policy_pb2.PolicySpec,
        versions: Versions,
        prepare: Prepare,
        batcher: Batcher,
        episodes: Episodes,
        metrics: Metrics,
        sessions: Sessions | None = None,
        preparers: int = 2,
    ):
        self._spec = spec
        self._versions = versions
        self._prepare = prepare
        self._batcher = batcher
        self._episodes = episodes
        self._sessions = sessions
        self.metrics = metrics
        self._crew = Crew(preparers, "prepare")
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="build")
        self._entrance, self._door = Door(), Door()  # for new episodes, and for decisions of those there are
        self._streams: set[RobotStream] = set()

    def open(self) -> None:
        """From now on episodes and their decisions are taken."""
        self._entrance.open()
        self._door.open()

    def drain(self) -> None:
        """No more new episodes."""
        self._entrance.close(DRAINING)

    def turn_in(self) -> None:
        """No more new episodes, but those of leases, until open()."""
        self._entrance.close(TURNING_IN)

    def sleep(self) -> None:
        """Nothing is taken until open()."""
        for door in (self._entrance, self._door):
            door.close(ASLEEP)

    async def stop(self) -> None:
        """Refuses new decisions too, finishes those under way, closes the open episodes as errors."""
        for door in (self._entrance, self._door):
            door.close(STOPPING)
        for stream in self._streams:
            stream.stop()
        await asyncio.gather(*(self._stop(episode) for episode in self._episodes.open))

    async def expire(self, idle_s: float) -> None:
        """Ends what was silent for longer than idle_s, episodes as errors; runs until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, idle_s / 4))
            for stream in self._streams:
                stream.watch(idle_s)
            silent = self._episodes.idle(idle_s)
            for episode in silent:
                log.warning("episode %s was silent for %g s: closed as an error", episode.start.episode_id, idle_s)
            why = f"nothing was heard of it for {idle_s:g} s"
            await asyncio.gather(*(self._close(episode, error=why, by="silence") for episode in silent))

    def check(self) -> None:
        """Raises Unavailable while no episodes are taken."""
        self._entrance.check()

    def is_open(self, episode_id: str) -> bool:
        """Whether decisions of that episode are taken."""
        return self._episodes.is_open(episode_id)

    def is_full(self, episode_id: str) -> bool:
        """Whether that open episode takes no more decisions, however many it had."""
        return self._episodes.find(episode_id).is_full

    def spec(self) -> policy_pb2.PolicySpec:
        """Everything a client must know before it moves, as it is now."""
        spec = policy_pb2.PolicySpec()
        spec.CopyFrom(self._spec)
        spec.live_version = self._versions.live
        spec.versions.extend(self._versions.known)
        spec.stores_episodes = self._episodes.stores
        spec.max_request_bytes, spec.max_request_ticks = max_request_bytes(self._spec), MAX_TICKS
        return spec

    @counted("start")
    async def start(self, request: policy_pb2.StartEpisodeRequest, *, client: str = "") -> policy_pb2.StartEpisodeReply:
        """Opens an episode of that client's.  Raises Refused."""
        self._entrance.check(leased=bool(request.lease_id))
        check_names(request, "task", "initial_state", "arm", "asset_tree", "request_id", "session_id")
        reply = self._episodes.start(request, self._start_record, client=client)
        if not self._versions.holds(reply.version):
            await self._build(request, reply)
        return reply

    @counted("act")
    async def answer(self, request: policy_pb2.ActRequest) -> policy_pb2.ActReply:
        """The chunk for one request; who is cancelled while waiting for it waits no more.  Raises Refused."""
        self._door.check()
        episode = self._episodes.find(request.episode_id)
        stored = episode.arrive(request)
        if stored is not None:
            return stored
        flight = self._launch(episode, request)
        try:
            return await asyncio.shield(flight.task)
        finally:
            self._batcher.withdraw(flight.ticket, Abandoned("nobody waits for this answer"))
            del flight  # a refusal holds the frames that it came through, and this one would hold the refusal

    @counted("end")
    async def end(self, request: policy_pb2.EndEpisodeRequest) -> policy_pb2.EndEpisodeReply:
        """Closes an episode, once; returns when it is safe.  Raises Refused."""
        if self._episodes.is_open(request.episode_id):
            episode = self._episodes.find(request.episode_id)
            ending = asyncio.create_task(self._end(episode, request))
            episode.ends.add(ending)
            ending.add_done_callback(episode.ends.discard)
            await ending
        closing = self._episodes.closing(request.episode_id)
        if closing is not None:
            await asyncio.shield(closing)
        return policy_pb2.EndEpisodeReply(sequence=self._episodes.ended_as(request.episode_id, request.outcome))

    @refusing
    async def GetSpec(self, request: policy_pb2.GetSpecRequest, context: Any) -> policy_pb2.PolicySpec:
        return self.spec()

    @refusing
    async def StartEpisode(self, request: policy_pb2.StartEpisodeRequest, context: Any) -> policy_pb2.StartEpisodeReply:
        return await self.start(request, client=client_of(context.peer()))

    @refusing
    async def Act(self, request: policy_pb2.ActRequest, context: Any) -> policy_pb2.ActReply:
        return await self.answer(request)

    @refusing
    async def ActStream(self, requests: AsyncIterator[policy_pb2.ActRequest], context: Any) -> None:
        stream = RobotStream(self._replied, context.write)
        self._streams.add(stream)
        try:
            await stream.serve(requests)
        finally:
            self._streams.discard(stream)

    @refusing
    async def EndEpisode(self, request: policy_pb2.EndEpisodeRequest, context: Any) -> policy_pb2.EndEpisodeReply:
        return await self.end(request)

    async def _replied(self, request: policy_pb2.ActRequest) -> policy_pb2.ActReply:
        """The answer or the refusal: in a stream both are replies."""
        with about(**ids(request)):
            try:
                with refusals_only():
                    return await self.answer(request)
            except Refused as refused:
                note(refused)
                return _reply(request, refusal=refused.message)

    async def _build(self, request: policy_pb2.StartEpisodeRequest, reply: policy_pb2.StartEpisodeReply) -> None:
        """The weights of an episode that has pinned them by now; one that cannot have them is closed again."""
        try:
            with refusals_only():
                await asyncio.get_running_loop().run_in_executor(self._builder, self._versions.weights, reply.version)
        except Refused as refused:
            self._episodes.unstart(request.request_id)
            if self._episodes.is_open(reply.episode_id):
                await self._close(self._episodes.find(reply.episode_id), error=str(refused))
            raise

    def _launch(self, episode: Episode, request: policy_pb2.ActRequest) -> Flight:
        """Newest wins: what the model has not seen yet of this episode is refused; what it has is shared by a retry."""
        for decision, flight in episode.flights.items():
            superseded = self._batcher.withdraw(flight.ticket, Superseded("superseded by a newer observation"))
            if not superseded and decision == request.decision and not flight.ticket.refused:
                return flight
        ticket = self._batcher.admit()
        flight = Flight(ticket=ticket, task=asyncio.create_task(self._decide(episode, request, ticket)))
        episode.flights[request.decision] = flight
        flight.task.add_done_callback(lambda _: _land(episode, request.decision, flight))
        return flight

    async def _decide(self, episode: Episode, request: policy_pb2.ActRequest, ticket: Ticket) -> policy_pb2.ActReply:
        started_s = time.monotonic()
        submitting = asyncio.create_task(self._submit(episode.start, request, ticket))
        try:
            answered = await asyncio.wrap_future(ticket.answer)
        finally:
            submitting.cancel()  # when it was withdrawn before its turn came, nobody prepares it
        prepare_ms = 1e3 * (ticket.submitted_s - started_s)
        self.metrics.prepared(prepare_ms / 1e3)
        reply = _reply(request, chunk=_chunk(answered, episode.start.temperature, prepare_ms))
        older = [flight.task for decision, flight in episode.flights.items() if decision < request.decision]
        await asyncio.gather(*older, return_exceptions=True)  # another lane may be slower: recorded is in order
        try:
            episode.answered(request, reply)
        except Exception as error:  # whatever it was, the file may hold half a record
            raise await self._episodes.lose(episode, error) from error
        return reply

    async def _submit(self, start: episode_pb2.EpisodeStart, request: policy_pb2.ActRequest, ticket: Ticket) -> None:
        """Prepares a request and queues it, or refuses it."""
        try:
            with refusals_only():
                decode = DecodeRequest(
                    prepared=await self._crew.do(self._prepared, request),
                    version=self._versions.live if start.follow_live else start.version,
                    temperature=start.temperature,
                    noise_correlation=start.noise_correlation,
                    seed=start.seed,
                    decision=request.decision,
                )
        except Refused as refused:
            self._batcher.withdraw(ticket, refused)
        else:
            self._batcher.submit(ticket, decode)

    def _prepared(self, request: policy_pb2.ActRequest) -> Any:
        check_ticks(request.executed, len(self._spec.action))
        return self._prepare(read_observation(request.observation, self._spec, field="observation"))

    async def _end(self, episode: Episode, request: policy_pb2.EndEpisodeRequest) -> None:
        """Looks at a request to end the episode, and begins to close it."""
        await self._crew.do(self._check_end, request)
        if not self._episodes.is_open(request.episode_id):
            return
        end = episode_pb2.EpisodeEnd(
            outcome=request.outcome,
            terminal=request.terminal,
            final_observation=request.final_observation if request.HasField("final_observation") else None,
            message=request.message,
            ended_unix_ns=time.time_ns(),
        )
        self._begin_close(episode, end, list(request.executed))

    def _check_end(self, request: policy_pb2.EndEpisodeRequest) -> None:
        check_choice(request.outcome, episode_pb2.Outcome, "must say how the episode ended", field="outcome")
        check_ticks(request.executed, len(self._spec.action))
        # An episode that ended in an error is taken whatever it saw last: the frame may be the error.
        if request.outcome == episode_pb2.OUTCOME_ERROR:
            check_cameras(request.final_observation, field="final_observation")
        elif request.HasField("final_observation"):
            read_observation(request.final_observation, self._spec, field="final_observation")

    def _begin_close(
        self,
        episode: Episode,
        end: episode_pb2.EpisodeEnd,
        ticks: list[episode_pb2.Tick],
        *,
        by: EndedBy = "client",
    ) -> asyncio.Task[None]:
        """Closes an episode, once: a closing under way goes on."""

        async def close() -> None:
            for flight in list(episode.flights.values()):
                self._batcher.withdraw(flight.ticket, Superseded("superseded by the end of the episode"))
                await asyncio.wait({flight.task})  # one that is in the model is still recorded
            await self._episodes.close(episode, end, ticks, by=by)

        episode.closing = episode.closing or asyncio.create_task(close())
        return episode.closing

    async def _stop(self, episode: Episode) -> None:
        """Closes an episode as an error, unless its client was about to end it."""
        under_way = [*episode.ends, *(flight.task for flight in episode.flights.values())]
        await asyncio.gather(*under_way, return_exceptions=True)
        await self._close(episode, error="the server stopped")

    async def _close(self, episode: Episode, *, error: str, by: EndedBy = "server") -> None:
        end = episode_pb2.EpisodeEnd(outcome=episode_pb2.OUTCOME_ERROR, message=error, ended_unix_ns=time.time_ns())
        closing = self._begin_close(episode, end, [], by=by)
        with contextlib.suppress(Refused), refusals_only():  # whatever it is, the log says so, and the others go on
            await asyncio.shield(closing)  # who waits may be cancelled, the closing not

    def _start_record(
        self, episode_id: str, request: policy_pb2.StartEpisodeRequest, rollout: rollout_pb2.Rollout | None
    ) -> episode_pb2.EpisodeStart:
        """The first record of an episode.  What to run and how to sample is the rollout's to say, when there is one."""
        asked = rollout if rollout is not None else request
        follow_live = request.follow_live and rollout is None
        check_sampling(asked.temperature, asked.noise_correlation)
        if not (math.isfinite(request.tick_rate_hz) and request.tick_rate_hz >= 0):
            raise BadRequest(f"must be finite and not negative, got {request.tick_rate_hz}", field="tick_rate_hz")
        check_choice(asked.purpose, episode_pb2.Purpose, "must say what the episode is for", field="purpose")
        if follow_live and asked.HasField("version"):
            raise BadRequest(
                f"an episode follows live or names a version, got version {asked.version} and follow_live",
                field="follow_live",
            )
        how, version = asked, self._versions.live
        if asked.session_id:
            how, version = self._chosen(asked)
        elif asked.HasField("version"):
            version = self._versions.check(asked.version)
        return episode_pb2.EpisodeStart(
            episode_id=episode_id,
            task=asked.task,
            initial_state=asked.initial_state,
            purpose=asked.purpose,
            version=version,
            follow_live=follow_live and not asked.session_id,
            temperature=how.temperature,
            noise_correlation=how.noise_correlation,
            seed=asked.seed if asked.HasField("seed") else secrets.randbits(63),
            base_fingerprint=self._spec.base_fingerprint,
            image_path=self._spec.image_path,
            unnorm_key=self._spec.unnorm_key,
            asset_tree=request.asset_tree,
            arm=request.arm,
            tick_rate_hz=request.tick_rate_hz,
            started_unix_ns=time.time_ns(),
            state_names=[dimension.name for dimension in self._spec.state],
            rollout_id=rollout.rollout_id if rollout is not None else "",
            session_id=asked.session_id,
        )

    def _chosen(self, asked: policy_pb2.StartEpisodeRequest | rollout_pb2.Rollout) -> tuple[Charter, int]:
        """How an episode of a session is sampled, and the version it gets.  Raises Refused."""
        if self._sessions is None:
            raise OutOfOrder(NO_SESSIONS, field="session_id")
        chosen = self._sessions.choose(asked.session_id)
        if asked.purpose != episode_pb2.PURPOSE_TRAIN:
            raise BadRequest("an episode of a session is practice: must be PURPOSE_TRAIN", field="purpose")
        return chosen


def _land(episode: Episode, decision: int, flight: Flight) -> None:
    if episode.flights.get(decision) is flight:
        del episode.flights[decision]
    refused = None if flight.task.cancelled() else flight.task.exception()  # seen: whoever still waits for it is told
    if isinstance(refused, Refused):
        bare(refused)  # the flight holds it, and it would hold the request


def _chunk(answered: Answered, temperature: float, prepare_ms: float) -> episode_pb2.Chunk:
    answer = answered.answer
    return episode_pb2.Chunk(
        actions=encode_tensor(answer.actions_KA),
        token_ids=encode_tensor(answer.token_ids_N),
        token_logprobs=encode_tensor(answer.token_logprobs_N),
        version=answered.version,
        temperature=temperature,
        timing=episode_pb2.Timing(
            queue_ms=answered.queue_ms,
            prepare_ms=prepare_ms,
            vision_ms=answer.vision_ms,
            prefill_ms=answer.prefill_ms,
            decode_ms=answer.decode_ms,
            batch_size=answered.batch_size,
        ),
    )


def _reply(
    request: policy_pb2.ActRequest,
    *,
    chunk: episode_pb2.Chunk | None = None,
    refusal: policy_pb2.Refusal | None = None,
) -> policy_pb2.ActReply:
    return policy_pb2.ActReply(
        episode_id=request.episode_id,
        decision=request.decision,
        capture_time_ns=request.observation.capture_time_ns,
        chunk=chunk,
        refusal=refusal,
    )
