"""What the server counts and tells Prometheus: names in base units, in a registry of each server's own.

What happens is counted as it happens.  What can be read off the server at any time (its queue, versions, episodes and
robots) is read when somebody asks, so that a robot that has gone leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter as Counts
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, GCCollector, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from policy_server.batcher import Batcher, DecodeAnswer, Ticket
from policy_server.episode_store import EpisodeStore
from policy_server.episodes import Episode, Episodes, word
from policy_server.errors import (
    BadRequest,
    Forbidden,
    InternalFault,
    Overloaded,
    Refused,
    TooSlow,
    Unauthenticated,
    Unavailable,
)
from policy_server.version_store import Kind, VersionStore
from policy_server.versions import Versions
from protos import episode_pb2

Call = Literal["start", "act", "end"]
ANSWERED, CANCELLED = "answered", "cancelled"
AT_DOORS_ONLY = (Unauthenticated, Forbidden, TooSlow)
AT_DOORS = (*AT_DOORS_ONLY, BadRequest, Overloaded, Unavailable)
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """What has happened since the server started.  Thread-safe."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "vla_rl_requests",
            "Requests of robots, by call (start, act, end) and by what became of them: answered, cancelled by the"
            " client, or refused with this status.",
            ["call", "outcome"],
            registry=registry,
        )
        self._turned_away = Counter(
            "vla_rl_turned_away",
            "Calls, connections and page requests that were refused at a port with this status, before anything was"
            " done for them.",
            ["status"],
            registry=registry,
        )
        self._decision = Histogram(
            "vla_rl_decision_seconds",
            "From the arrival of an act request to its answer.",
            buckets=SECONDS,
            registry=registry,
        )
        phase = Histogram(
            "vla_rl_phase_seconds",
            "Where the time goes: prepare and queue for each request; vision, prefill and decode for each pass of the"
            " model.",
            ["phase"],
            buckets=SECONDS,
            registry=registry,
        )
        self._prepare, self._queue = phase.labels("prepare"), phase.labels("queue")
        self._vision, self._prefill, self._decode = (phase.labels(name) for name in ("vision", "prefill", "decode"))
        self._batch_size = Histogram(
            "vla_rl_batch_size", "Requests that shared a pass of the model.", buckets=BATCHES, registry=registry
        )
        self._tokens = Counter("vla_rl_tokens", "Action tokens that the model decoded.", registry=registry)
        # A rate needs the zero before the first one.
        refusals = {_outcome(kind) for kind in Refused.__subclasses__() if kind not in AT_DOORS_ONLY}
        for outcome in sorted({ANSWERED, CANCELLED, *refusals}):
            self._requests.labels("act", outcome)
        for kind in AT_DOORS:
            self._turned_away.labels(_outcome(kind))
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)

    @contextlib.contextmanager
    def request(self, call: Call) -> Iterator[None]:
        """Counts a request by what becomes of it, and times a decision that is answered."""
        started_s, outcome = time.monotonic(), CANCELLED
        try:
            yield
            outcome = ANSWERED
            if call == "act":
                self._decision.observe(time.monotonic() - started_s)
        except Refused as refused:
            outcome = _outcome(type(refused))
            raise
        except Exception:
            outcome = _outcome(InternalFault)
            raise
        finally:
            self._requests.labels(call, outcome).inc()

    @contextlib.contextmanager
    def door(self) -> Iterator[None]:
        """Counts whom it turns away."""
        try:
            yield
        except Refused as refused:
            self._turned_away.labels(_outcome(type(refused))).inc()
            raise

    def prepared(self, seconds: float) -> None:
        """An observation was decoded and prepared."""
        self._prepare.observe(seconds)

    def passed(self, batch: Sequence[Ticket], answers: Sequence[DecodeAnswer], started_s: float) -> None:
        """The model answered a batch in a pass that began at started_s (time.monotonic)."""
        self._batch_size.observe(len(batch))
        self._tokens.inc(sum(answer.token_ids_N.size for answer in answers))
        for ticket in batch:
            self._queue.observe(started_s - ticket.submitted_s)
        self._vision.observe(answers[0].vision_ms / 1e3)
        self._prefill.observe(answers[0].prefill_ms / 1e3)
        self._decode.observe(answers[0].decode_ms / 1e3)

    @property
    def passes(self) -> tuple[int, int]:
        """How many passes of the model there were, and how many requests they answered."""
        values = {sample.name: int(sample.value) for metric in self._batch_size.collect() for sample in metric.samples}
        return values["vla_rl_batch_size_count"], values["vla_rl_batch_size_sum"]


def counted(call: Call):
    """A coroutine method of something with metrics, whose requests are counted in them."""

    def count(method):
        @functools.wraps(method)
        async def counting(self, *args, **options):
            with self.metrics.request(call):
                return await method(self, *args, **options)

        return counting

    return count


class ServerState(Collector):
    """What can be read off the server now.  A robot's figures last as long as it has an open episode."""

    def __init__(
        self,
        *,
        batcher: Batcher,
        episodes: Episodes,
        store: EpisodeStore | None,
        versions: Versions,
        version_store: VersionStore | None,
        adapter_slots: int,
    ):
        self._batcher, self._episodes, self._store = batcher, episodes, store
        self._versions, self._version_store, self._adapter_slots = versions, version_store, adapter_slots

    def collect(self) -> Iterator[Metric]:
        versions, swaps = self._versions, self._version_store.swaps if self._version_store is not None else ()
        episodes = self._episodes.open
        yield _gauge(
            "vla_rl_queue_depth", "Requests that are being prepared or wait for a pass.", self._batcher.waiting
        )
        yield _gauge("vla_rl_live_version", "The weights that new episodes get.", versions.live)
        yield self._held()
        yield _gauge(
            "vla_rl_adapter_slots", "Adapters that may be held though no open episode uses them.", self._adapter_slots
        )
        yield _counter("vla_rl_swaps", "How often another version was made live.", swaps[-1].number if swaps else 0)
        yield _gauge("vla_rl_open_episodes", "Episodes that are not closed yet.", len(episodes))
        yield self._ended()
        if self._store is not None:
            stored, stored_bytes = self._store.size
            yield _gauge("vla_rl_stored_episodes", "Whole episodes in the store.", stored)
            yield _gauge("vla_rl_stored_bytes", "What they take on disk.", stored_bytes)
        yield from _robots(episodes)

    def _ended(self) -> Metric:
        ended = CounterMetricFamily(
            "vla_rl_episodes_ended", "Episodes, by outcome: success, failure, error.", labels=["outcome"]
        )
        for code in episode_pb2.Outcome.values()[1:]:
            ended.add_metric([word(episode_pb2.Outcome, code)], self._episodes.ended[code])
        return ended

    def _held(self) -> Metric:
        held = GaugeMetricFamily(
            "vla_rl_versions_held", "Versions whose weights are in memory, by kind: first, full, lora.", labels=["kind"]
        )
        kinds = Counts(self._kind(version) for version in self._versions.known if self._versions.holds(version))
        for kind in get_args(Kind):
            held.add_metric([kind], kinds[kind])
        return held

    def _kind(self, version: int) -> Kind:
        record = self._version_store.find(version) if self._version_store is not None else None
        return record.kind if record is not None else "first"


def _robots(episodes: Iterable[Episode]) -> Iterator[Metric]:
    """By arm and client: those of one kind on one computer count as one."""
    robots: dict[tuple[str, str], list[Episode]] = defaultdict(list)
    for episode in episodes:
        robots[episode.robot].append(episode)
    labels = ["arm", "client"]
    rate = GaugeMetricFamily("vla_rl_robot_decisions_per_second", "Answers that a robot gets, lately.", labels=labels)
    age = GaugeMetricFamily("vla_rl_robot_age_seconds", "Since a robot was last heard of.", labels=labels)
    for robot, its in robots.items():
        rate.add_metric(robot, sum(episode.rate_hz for episode in its))
        age.add_metric(robot, max(episode.age_s for episode in its))
    yield from (rate, age)


def _outcome(kind: type[Refused]) -> str:
    return kind.status.name.lower()


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)
