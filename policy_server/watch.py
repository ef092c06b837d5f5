"""What somebody who looks at the server is shown: robots, queue, versions, and stored episodes frame by frame.

Plain values for JSON, and JPEGs.  Nothing is computed while nobody looks, but one sample a second for the plots.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from policy_server.batcher import Batcher
from policy_server.episode_store import EpisodeStore, Stored
from policy_server.episodes import Episode, Episodes, word
from policy_server.errors import Unavailable
from policy_server.gate import Tally
from policy_server.metrics import Metrics
from policy_server.session import Session
from policy_server.sessions import Sessions
from policy_server.version_store import VersionStore
from policy_server.versions import Versions
from protos import episode_pb2
from protos.codec import decode_image
from protos.episode_file import DamagedEpisode, EpisodeReader
from protos.image import encode_jpeg, resize

SAMPLES = 300
SAMPLE_S = 1.0
RECENT = 30
"""So many stored episodes are offered."""
MAX_TEXT = 200
"""Longer texts of a client's are cut."""
MAX_REASON = 1000
"""The same for a verdict's evidence."""
SHOWN_SESSIONS, SHOWN_EVENTS = 16, 12
"""The newest, at most; and of each, so many lines of its log."""
FRAME_PX = 320
"""The longer side of a frame, at most."""
QUALITY = 80


class Watch:
    """model, camera: the policy's name and the image it reads; check() raises Unavailable while it does not serve.

    state() belongs to the event loop's thread; recent() and the frames, which read the disk, to any one other.
    """

    def __init__(
        self,
        *,
        model: str,
        camera: str,
        check: Callable[[], None],
        batcher: Batcher,
        episodes: Episodes,
        store: EpisodeStore | None,
        versions: Versions,
        version_store: VersionStore | None,
        sessions: Sessions | None,
        metrics: Metrics,
    ):
        self._model, self._camera, self._check = model, camera, check
        self._batcher, self._metrics = batcher, metrics
        self._episodes, self._store = episodes, store
        self._versions, self._version_store = versions, version_store
        self._sessions = sessions
        self._samples: deque[list[float | None]] = deque(maxlen=SAMPLES)
        self._server = secrets.token_hex(4)
        self._started_s = time.monotonic()

    async def sample(self) -> None:
        """Keeps the last minutes; runs until cancelled."""
        passes, answered = self._metrics.passes
        while True:
            await asyncio.sleep(SAMPLE_S)
            passes_before, answered_before = passes, answered
            passes, answered = self._metrics.passes
            new_passes, new_answers = passes - passes_before, answered - answered_before
            batch = new_answers / new_passes if new_passes else None
            self._samples.append([time.time(), self._batcher.waiting, batch, new_answers / SAMPLE_S])

    @property
    def trouble(self) -> str:
        """Why the server does not serve; empty when it does."""
        try:
            self._check()
        except Unavailable as unavailable:
            return str(unavailable)
        return ""

    def state(self) -> dict[str, Any]:
        """Everything about now, and the last minutes.

        server: another word for another one, and for the same one started anew.
        samples: [wall clock in seconds, queue depth, requests of a pass or None, answers a second], oldest first.
        """
        swaps = self._version_store.swaps if self._version_store is not None else ()
        return {
            "server": self._server,
            "model": self._model,
            "trouble": self.trouble,
            "uptime_s": time.monotonic() - self._started_s,
            "live_version": self._versions.live,
            "queue_depth": self._batcher.waiting,
            "robots": [_robot(episode, self._versions.live) for episode in self._episodes.open],
            "swaps": [
                {
                    "unix_s": swap.unix_ns / 1e9,
                    "previous": swap.previous,
                    "live": swap.live,
                    "note": self._note(swap.live),
                }
                for swap in reversed(swaps)
            ],
            "sessions": self._session_list(),
            "samples": list(self._samples),
            "stores_episodes": self._store is not None,
            "newest_episode": self._store.newest if self._store is not None else 0,
        }

    def frame(self, episode_id: str) -> bytes:
        """The latest frame that an open episode got an answer for, as JPEG.  Raises LookupError where there is none."""
        for episode in self._episodes.open:
            if episode.start.episode_id == episode_id and episode.latest is not None:
                return self._jpeg(episode.latest)
        raise LookupError(episode_id)

    def recent(self, session_id: str = "") -> list[dict[str, Any]]:
        """The stored episodes, newest first; a session's alone where one is named.

        One that cannot be read says why in `damaged`.
        """
        return [_described(stored) for stored in self._store.latest(RECENT, session_id)] if self._store else []

    def stored_frame(self, episode_id: str, index: int) -> bytes:
        """What a stored episode's decision `index` saw, as JPEG; after the last one, its final observation.

        Raises LookupError where there is none, DamagedEpisode, and OSError when it has been deleted meanwhile.
        """
        if self._store is None or (stored := self._store.find(episode_id)) is None:
            raise LookupError(episode_id)
        episode = _reader(stored)
        if index == len(episode):
            return self._jpeg(episode.end.final_observation)
        return self._jpeg(episode.decision(index).observation)

    def _session_list(self) -> list[dict[str, Any]]:
        """The newest first, those that are over after the others."""
        if self._sessions is None:
            return []
        shown = list[dict[str, Any]]()
        for session_id in reversed(self._sessions.ids):
            with self._sessions.read(session_id) as session:
                shown.append(_session(session))
            shown[-1]["open"] = self._sessions.open_episodes(session_id)
        return sorted(shown, key=lambda one: one["state"] == "stopped")[:SHOWN_SESSIONS]

    def _note(self, version: int) -> str:
        found = self._version_store.find(version) if self._version_store is not None else None
        return found.note[:MAX_TEXT] if found is not None else ""

    def _jpeg(self, observation: episode_pb2.Observation) -> bytes:
        """The image that the policy reads, or else the first by name.  Raises LookupError, CodecError."""
        images = observation.images
        name = self._camera if self._camera in images else min(images, default="")
        if name not in images:
            raise LookupError(name)
        pixels_HW3 = decode_image(images[name])
        height, width = pixels_HW3.shape[:2]
        shrink = min(1.0, FRAME_PX / max(height, width))
        size = max(1, round(height * shrink)), max(1, round(width * shrink))
        return encode_jpeg(resize(pixels_HW3, size, "bicubic"), quality=QUALITY)


def _session(session: Session) -> dict[str, Any]:
    """Whole but for its open episodes.  versions: those that are the base, live or on trial, and what came of them."""
    standing, roles = session.standing, {session.charter.base: "base", session.live: "live"}
    if session.candidate is not None:
        roles[session.candidate] = "on trial"
    return {
        "session": session.charter.session_id,
        "task": session.charter.task[:MAX_TEXT],
        "state": session.state,
        "past": len(session.past),
        "live": session.live,
        "candidate": session.candidate,
        "episodes": sum(tally.episodes for tally in session.tallies.values()),
        "versions": [
            {"version": version, "role": role, **_counted(session.tallies.get(version, Tally()))}
            for version, role in sorted(roles.items())
        ],
        "standing": standing.reason if standing is not None else "",
        "log": [
            {
                "unix_s": event.unix_ns / 1e9,
                "what": event.what,
                "version": event.version,
                "by": event.by,
                "reason": event.reason[:MAX_REASON],
            }
            for event in reversed(session.log[-SHOWN_EVENTS:])
        ],
    }


def _counted(tally: Tally) -> dict[str, Any]:
    return {
        "episodes": tally.episodes,
        "successes": tally.successes,
        "interval": tally.interval,
        "interventions": tally.interventions,
        "errors": tally.errors,
        "trouble": tally.trouble,
    }


def _robot(episode: Episode, live: int) -> dict[str, Any]:
    start, latest = episode.start, episode.latest
    arm, client = episode.robot
    return {
        "episode": start.episode_id,
        "arm": arm,
        "client": client,
        "task": start.task[:MAX_TEXT],
        "instruction": latest.instruction[:MAX_TEXT] if latest is not None else "",
        "purpose": word(episode_pb2.Purpose, start.purpose),
        "version": live if start.follow_live else start.version,
        "decisions": episode.decisions,
        "rate_hz": episode.rate_hz,
        "age_s": episode.age_s,
    }


def _described(stored: Stored) -> dict[str, Any]:
    try:
        return _summary(stored)
    except DamagedEpisode as error:
        why = str(error)
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
    return {"sequence": stored.sequence, "episode": stored.episode_id, "damaged": why}


@functools.lru_cache(maxsize=4 * RECENT)
def _summary(stored: Stored) -> dict[str, Any]:
    """Raises DamagedEpisode, OSError."""
    episode = _reader(stored)
    start, end = episode.start, episode.end
    return {
        "sequence": stored.sequence,
        "episode": start.episode_id,
        "damaged": "",
        "arm": start.arm[:MAX_TEXT],
        "task": start.task[:MAX_TEXT],
        "instruction": episode.decision(0).observation.instruction[:MAX_TEXT] if len(episode) else "",
        "purpose": word(episode_pb2.Purpose, start.purpose),
        "version": start.version,
        "outcome": word(episode_pb2.Outcome, end.outcome),
        "message": end.message[:MAX_TEXT],
        "decisions": len(episode),
        "frames": len(episode) + bool(end.final_observation.images),
        "started_unix_s": start.started_unix_ns / 1e9,
        "seconds": (end.ended_unix_ns - start.started_unix_ns) / 1e9,
    }


@functools.lru_cache(maxsize=4)
def _reader(stored: Stored) -> EpisodeReader:
    return EpisodeReader(stored.path)
