"""An episode's file, written by the robot itself: for servers that keep none (PolicySpec.stores_episodes is False).

Holds what the server's file would hold (protos/episode_file.py), in the order in which the server writes it: an answer
comes after the ticks that had been executed when it was first asked for.  The version and the seed of an episode are
known to observers only when it is over, and a file begins with them: until then its records wait in a file without a
name, which is gone if this process dies.

Not in it: an answer that came after the last tick, of which nothing was executed.
"""

from __future__ import annotations

import contextlib
import logging
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from protos import episode_pb2
from protos.codec import ImageFormat, encode_tensor
from protos.episode_file import SUFFIX, EpisodeWriter
from robot_client.answer import Answer
from robot_client.arm import ArmSpec, ArmState, Observation
from robot_client.observer import Observer
from robot_client.rollout import EpisodeResult, Rollout
from robot_client.spec import PolicySpec
from robot_client.wire import encode_observation

log = logging.getLogger(__name__)

LENGTH = struct.Struct("<I")


class Recorder(Observer):
    """Writes FOLDER/<episode id>.episode, or .error.episode for one that ended as an error; one episode after another.

    policy and arm: who answers and who moves.  image_format: the client's, so that frames are kept as they were sent.
    A disk that takes no more loses the episode, which is logged, and does not stop the arm.
    """

    def __init__(self, folder: Path, policy: PolicySpec, arm: ArmSpec, *, image_format: ImageFormat = "raw"):
        self._folder = folder
        self._policy = policy
        self._arm = arm
        self._image_format: ImageFormat = image_format
        self._spool: IO[bytes] | None = None

    def on_start(self, rollout: Rollout, episode_id: str) -> None:
        self._started_unix_ns = time.time_ns()
        self._looks: dict[int, episode_pb2.Observation] = {}
        self._ticks: list[episode_pb2.Tick] = []
        self._carried = 0
        self._final: episode_pb2.Observation | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._spool = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed by on_end or _lose)
        except OSError as error:
            self._lose(error)

    def on_observation(self, observation: Observation) -> None:
        if not self._looks:
            self._carried = len(self._ticks)
        self._looks[observation.capture_time_ns] = self._as_sent(observation)

    def on_answer(self, answer: Answer) -> None:
        self._keep_ticks(self._carried)
        decision = episode_pb2.Decision(
            decision=answer.decision, observation=self._looks[answer.capture_time_ns], chunk=chunk_of(answer)
        )
        self._looks.clear()
        self._keep(episode_pb2.EpisodeRecord(decision=decision))

    def on_tick(self, state: ArmState, tick: episode_pb2.Tick) -> None:
        self._ticks.append(tick)

    def on_final_observation(self, observation: Observation) -> None:
        self._final = self._as_sent(observation)

    def on_end(self, result: EpisodeResult) -> None:
        if self._spool is None:  # the server never opened it, or it is lost
            return
        self._keep_ticks(len(self._ticks))
        end = episode_pb2.EpisodeEnd(
            outcome=f"OUTCOME_{result.outcome.upper()}",
            terminal=result.terminal,
            final_observation=self._final,
            message=result.message,
            ended_unix_ns=time.time_ns(),
        )
        writer = None
        try:
            name = f"{result.episode_id}{'.error' * (result.outcome == 'error')}{SUFFIX}"
            writer = EpisodeWriter(self._folder / name, self._start(result))
            for record in self._kept():
                writer.executed(list(record.executed.ticks))
                if record.HasField("decision"):
                    writer.decision(record.decision)
            writer.finish(end)
            self._close()
        except OSError as error:
            if writer is not None:
                writer.discard()
            self._lose(error)

    def _start(self, result: EpisodeResult) -> episode_pb2.EpisodeStart:
        rollout, policy = result.rollout, self._policy.message
        return episode_pb2.EpisodeStart(
            episode_id=result.episode_id,
            task=rollout.task.name,
            initial_state=rollout.task.initial_state,
            purpose=f"PURPOSE_{rollout.purpose.upper()}",
            version=result.version,
            follow_live=rollout.follow_live,
            temperature=rollout.temperature,
            noise_correlation=rollout.noise_correlation,
            seed=result.seed,
            base_fingerprint=policy.base_fingerprint,
            image_path=policy.image_path,
            unnorm_key=policy.unnorm_key,
            asset_tree=self._arm.asset_tree,
            arm=self._arm.name,
            tick_rate_hz=self._arm.tick_rate_hz,
            started_unix_ns=self._started_unix_ns,
            state_names=self._policy.state_names,
            session_id=rollout.session_id,
        )

    def _as_sent(self, observation: Observation) -> episode_pb2.Observation:
        """What the policy reads of it, as the client encodes it."""
        return encode_observation(self._policy.read_of(observation, self._arm), self._image_format)

    def _keep_ticks(self, count: int) -> None:
        ticks = self._ticks[:count]
        del self._ticks[:count]
        self._keep(episode_pb2.EpisodeRecord(executed=episode_pb2.Executed(ticks=ticks)))

    def _keep(self, record: episode_pb2.EpisodeRecord) -> None:
        if self._spool is None:
            return
        data = record.SerializeToString()
        try:
            self._spool.write(LENGTH.pack(len(data)) + data)
        except OSError as error:
            self._lose(error)

    def _kept(self) -> Iterator[episode_pb2.EpisodeRecord]:
        assert self._spool is not None
        self._spool.seek(0)
        while head := self._spool.read(LENGTH.size):
            yield episode_pb2.EpisodeRecord.FromString(self._spool.read(*LENGTH.unpack(head)))

    def _lose(self, error: OSError) -> None:
        log.error("this episode is not recorded, its file takes no more records: %s", error.strerror)
        self._close()

    def _close(self) -> None:
        if self._spool is not None:
            with contextlib.suppress(OSError):  # what is still in its buffer, on a full disk
                self._spool.close()
            self._spool = None


def chunk_of(answer: Answer) -> episode_pb2.Chunk:
    """The message that the answer came as."""
    return episode_pb2.Chunk(
        actions=encode_tensor(answer.actions_KA),
        token_ids=encode_tensor(answer.token_ids_N),
        token_logprobs=encode_tensor(answer.token_logprobs_N),
        version=answer.version,
        temperature=answer.temperature,
        timing=answer.timing,
    )
