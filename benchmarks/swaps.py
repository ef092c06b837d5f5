"""A server under load: killed, told to stop, and given new weights a thousand times, one in ten of them bad.

    python -m benchmarks.swaps [--parts kill stop publish] [--publishes 1000] [--robots 8]

kill: SIGKILL at a random moment, several times over one folder; every episode whose end was acknowledged has to lie
there whole.  stop: SIGTERM; calls under way have to be answered, later ones refused, and the process ends with code 0.
publish: every answer is scored again, by a model of this process's own with the weights of the version that the answer
names; the gap between two answers of a robot is compared with that in slices in which nothing is published.
Prints a table, writes benchmarks/results/swaps.json.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal

import grpc
import numpy as np
import psutil
import torch
import tyro
from safetensors.torch import save

from benchmarks.load import ANSWERED, GONE, Call, Load, loading
from benchmarks.memory import growth
from benchmarks.serving import observation
from policy_server.config import ServeConfig
from policy_server.loading import load
from policy_server.observation import read_observation
from policy_server.vla.checkpoint import load_checkpoint
from policy_server.vla.lora import apply_lora, save_lora
from policy_server.vla_model import VlaModel, Weights
from protos import admin_pb2, admin_pb2_grpc
from protos.channel import OPTIONS
from protos.episode_file import DamagedEpisode, read_episode

RESULT = Path(__file__).parent / "results" / "swaps.json"
Part = Literal["kill", "stop", "publish"]
LIVE = "language_model.model.norm.weight"
"""What a full version changes: small, and every answer depends on it."""
RANK = 4
ON_ITS_WAY_S = 0.1
"""A call that began so shortly before the signal may have reached the server after it."""
MAY = {"before": (ANSWERED,), "under way": (ANSWERED,), "at that moment": (ANSWERED, GONE), "later": (GONE,)}
"""How a call may end, by where it stands to the moment of the signal."""
PER_VERSION = 4
"""So many answers of each version are scored again."""
SAME = 5e-4
"""Log-probabilities of the same weights differ by less: rounding, alone and in a batch."""
DEADLINE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class SwapsConfig:
    """Kill, stop and swap a server under load."""

    parts: tuple[Part, ...] = ("kill", "stop", "publish")
    """What to do."""
    model: str = "nano"
    """As for `python -m policy_server serve`."""
    robots: int = 8
    """That ask all the time."""
    rounds: int = 10
    """Of kill and of stop."""
    publishes: int = 1000
    """Good and bad together."""
    pause_s: float = 0.25
    """Before each of them, so that one can be told from the next."""
    slices: int = 20
    """In which they come, with as many between them in which nothing is published: a disturbance hits both alike."""
    calm_s: float = 15.0
    """Of a slice without publishing."""
    seed: int = 0
    """Of moments and weights."""


def main(config: SwapsConfig) -> None:
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    with loading() as robots:
        for part in config.parts:
            results[part] = {"kill": kills, "stop": stops, "publish": publishes}[part](config, robots)
            print_part(part, results[part])
            RESULT.parent.mkdir(parents=True, exist_ok=True)
            RESULT.write_text(json.dumps(results, indent=1) + "\n")


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server of its own."""

    process: subprocess.Popen
    address: str
    admin: admin_pb2_grpc.AdminStub

    @property
    def rss_mb(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 1e6


@contextlib.contextmanager
def served(config: SwapsConfig, folder: Path) -> Iterator[Served]:
    line = [sys.executable, "-m", "policy_server", "serve", "--model", config.model, "--port", "0", "--admin-port", "0"]
    line += ["--episodes", str(folder / "episodes"), "--keep-gb", "0.5"]
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        address, admin_address = (process.stdout.readline().split()[1] for _ in range(2))
        with grpc.insecure_channel(admin_address, options=OPTIONS) as channel:
            yield Served(process=process, address=address, admin=admin_pb2_grpc.AdminStub(channel))
    finally:
        process.kill()
        process.wait()


def kills(config: SwapsConfig, robots: Load) -> dict:
    """Nothing acknowledged is lost."""
    chance, calls = random.Random(config.seed), list[Call]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(config.rounds):
            with served(config, folder) as server:
                robots.start(server.address, config.robots, decisions=2)
                time.sleep(chance.uniform(2.0, 5.0))
                server.process.kill()
                server.process.wait()
                calls += robots.stop()
        with served(config, folder):  # what the last kill left is taken stock of
            pass
        stored, damaged = read(folder / "episodes")
    acknowledged = [call for call in calls if call.what == "end" and call.outcome == ANSWERED]
    lost = [call for call in acknowledged if stored.get(call.episode_id) != call.sequence]
    return {
        "kills": config.rounds,
        "episodes acknowledged": len(acknowledged),
        "of them lost": len(lost),
        "of them twice": len(acknowledged) - len({call.episode_id for call in acknowledged}),
        "damaged files": len(damaged),
        "ends that were not acknowledged": sum(call.what == "end" for call in calls) - len(acknowledged),
        "held": bool(acknowledged) and not lost and not damaged,
    }


def read(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Episode id -> sequence number of each whole episode; the files that are not whole."""
    stored, damaged = {}, []
    for path in folder.glob("*.episode"):
        number, _, _ = path.name.partition("-")
        try:
            stored[read_episode(path).start.episode_id] = int(number)
        except DamagedEpisode:
            damaged.append(path.name)
    return stored, damaged


def stops(config: SwapsConfig, robots: Load) -> dict:
    """What is under way is answered, what comes later refused, and the process ends well."""
    chance, codes, took_s = random.Random(config.seed), list[int](), list[float]()
    sorted_out: Counter[str] = Counter()
    broken: list[str] = []
    for _ in range(config.rounds):
        with tempfile.TemporaryDirectory() as name, served(config, Path(name)) as server:
            robots.start(server.address, config.robots, decisions=50)
            time.sleep(chance.uniform(2.0, 5.0))
            told_s = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            codes.append(server.process.wait(60))
            took_s.append(time.monotonic() - told_s)
            for call in robots.stop():
                kind = _beside(call, told_s)
                sorted_out[f"{kind}: {call.outcome}"] += 1
                if call.outcome not in MAY[kind]:
                    broken.append(f"{kind}: {call.what} ended with {call.outcome}: {call.said}")
    return {
        "stops": config.rounds,
        "exit codes": codes,
        "calls": dict(sorted(sorted_out.items())),
        "seconds to end, median": round(float(np.median(took_s)), 2),
        "seconds to end, most": round(max(took_s), 2),
        "broken": broken[:20],
        "held": not broken and set(codes) == {0},
    }


def _beside(call: Call, told_s: float) -> str:
    """Where a call stands to the moment of the signal."""
    if call.ended_s < told_s:
        return "before"
    if call.began_s < told_s - ON_ITS_WAY_S:
        return "under way"
    return "later" if call.began_s > told_s + ON_ITS_WAY_S else "at that moment"


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Weights as they are sent."""

    kind: Literal["full", "lora"]
    data: bytes
    adapter_config: str = ""
    base_fingerprint: str = ""
    """empty: the right one"""
    bad: str = ""
    """what is wrong with them"""

    def messages(self, fingerprint: str, note: str) -> Iterator[admin_pb2.PublishWeightsRequest]:
        kinds = {"full": admin_pb2.WEIGHTS_KIND_FULL, "lora": admin_pb2.WEIGHTS_KIND_LORA}
        header = admin_pb2.WeightsHeader(
            kind=kinds[self.kind],
            base_fingerprint=self.base_fingerprint or fingerprint,
            sha256=hashlib.sha256(self.data).hexdigest(),
            bytes=len(self.data),
            adapter_config=self.adapter_config,
            note=note,
            set_live=True,
        )
        yield admin_pb2.PublishWeightsRequest(header=header)
        for begin in range(0, len(self.data), 2**20):
            yield admin_pb2.PublishWeightsRequest(data=self.data[begin : begin + 2**20])

    def save(self, folder: Path) -> None:
        name = "model.safetensors" if self.kind == "full" else "adapter_model.safetensors"
        (folder / name).write_bytes(self.data)
        if self.kind == "lora":
            (folder / "adapter_config.json").write_text(self.adapter_config)


class Press:
    """Makes publications: number n is the same whenever it is asked for."""

    def __init__(self, config: SwapsConfig):
        self._seed = config.seed
        self._model = load_checkpoint(config.model).model
        self._norm = self._model.state_dict()[LIVE].clone()
        self._factors = apply_lora(self._model, rank=RANK, alpha=2 * RANK)

    def good(self, number: int) -> Publication:
        """In turn the whole of a small tensor, and an adapter of every layer."""
        torch.manual_seed(self._seed + number)
        if number % 2:
            return Publication(kind="full", data=save({LIVE: self._norm * (1 + 0.2 * torch.randn_like(self._norm))}))
        with torch.no_grad(), tempfile.TemporaryDirectory() as name:
            for factor in self._factors:
                factor.normal_(std=0.05)
            save_lora(self._model, Path(name))
            data = (Path(name) / "adapter_model.safetensors").read_bytes()
            return Publication(kind="lora", data=data, adapter_config=(Path(name) / "adapter_config.json").read_text())

    def bad(self, number: int) -> Publication:
        """In turn each thing that may be wrong."""
        norm = self._norm.clone()
        norm[number % len(norm)] = float("nan")
        whole = save({LIVE: self._norm})
        return [
            Publication(kind="full", data=save({LIVE: norm}), bad="not a number"),
            Publication(kind="full", data=whole, base_fingerprint="0" * 64, bad="another base"),
            Publication(kind="full", data=whole[: len(whole) // 2], bad="truncated"),
            Publication(kind="full", data=save({"odd.weight": self._norm}), bad="an unknown tensor"),
        ][number // 10 % 4]


def publishes(config: SwapsConfig, robots: Load) -> dict:
    """No answer mixes versions, no bad one goes live, memory is flat, and a swap stalls nobody for long."""
    press = Press(config)
    calm, busy = list[list[Call]](), list[list[Call]]()
    with tempfile.TemporaryDirectory() as name, served(config, Path(name)) as server:
        printed = Printed(config, press, server)
        unhurried(config, robots, server)  # the first pass of each batch size is a slow one
        for numbers in np.array_split(np.arange(config.publishes), config.slices):
            calm.append(unhurried(config, robots, server))
            robots.start(server.address, config.robots, decisions=6)
            for number in numbers.tolist():
                time.sleep(config.pause_s)
                printed.publish(number)
            busy.append(robots.stop())
        kept = len(server.admin.ListVersions(admin_pb2.ListVersionsRequest(), timeout=DEADLINE_S).versions)
        status = server.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=DEADLINE_S)
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(60)
    calls = list(chain(*calm, *busy))
    acts = [call for call in chain(*busy) if call.what == "act"]
    failed = Counter(f"{call.what}: {call.outcome}" for call in calls if call.outcome != ANSWERED)
    scores = rescored(config, printed.versions, calls)
    memory = growth(printed.rss, from_s=printed.rss[-1][0] / 5)
    return {
        "publications": config.publishes,
        "versions": len(printed.versions),
        "versions kept": kept,
        "refused": dict(printed.refusals),
        "seconds a publication": spread([end - begin for begin, end in printed.moments_s], digits=3),
        "answers while publishing": len(acts),
        "of so many versions": len({call.version for call in acts}),
        "calls that failed": dict(failed),
        "scored again": scores,
        "gap between a robot's answers, ms": stall(gaps_ms(calm), gaps_ms(busy), printed.moments_s),
        "pass of the model, ms": spread([call.pass_ms for call in calls if call.pass_ms]),
        "memory": memory,
        "episodes": {"successes": status.successes, "failures": status.failures, "errors": status.errors},
        "broken": printed.broken[:20],
        "held": {
            "every good one went live, no bad one": not printed.broken,
            "every call was answered": not failed,
            "no answer mixes versions": scores["largest difference"] < SAME < scores["least of another version's"],
            "memory grew by less than 2 %": memory["growth"] < 0.02,
            "exit code 0": code == 0,
        },
    }


def unhurried(config: SwapsConfig, robots: Load, server: Served) -> list[Call]:
    """A slice in which nothing is published."""
    robots.start(server.address, config.robots, decisions=6)
    time.sleep(config.calm_s)
    return robots.stop()


class Printed:
    """What was published on a server, and how that went."""

    def __init__(self, config: SwapsConfig, press: Press, server: Served):
        self._press, self._server = press, server
        self._fingerprint = load_checkpoint(config.model).fingerprint
        self._began_s = time.monotonic()
        self.versions: dict[int, Publication] = {}
        self.refusals: Counter[str] = Counter()
        self.moments_s: list[tuple[float, float]] = []
        """when each was begun and done"""
        self.rss: list[tuple[float, float]] = []
        """(s, MB) after each"""
        self.broken: list[str] = []

    def publish(self, number: int) -> None:
        """One in ten is bad."""
        weights = self._press.bad(number) if number % 10 == 9 else self._press.good(number)
        begun_s = time.monotonic()
        version = self._sent(weights)
        self.moments_s.append((begun_s, time.monotonic()))
        if (version is None) != bool(weights.bad):
            self.broken.append(f"publication {number} ({weights.bad or 'good'}) became version {version}")
        if version is not None:
            self.versions[version] = weights
        live = self._server.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=DEADLINE_S).live_version
        if live != max(self.versions, default=0):
            self.broken.append(f"version {live} is live after publication {number}")
        self.rss.append((time.monotonic() - self._began_s, self._server.rss_mb))

    def _sent(self, weights: Publication) -> int | None:
        """The version, None when the weights were refused."""
        try:
            reply = self._server.admin.PublishWeights(weights.messages(self._fingerprint, "swaps"), timeout=DEADLINE_S)
        except grpc.RpcError as error:
            self.refusals[f"{weights.bad}: {error.code().name}"] += 1  # pyright: ignore[reportAttributeAccessIssue]
            return None
        return reply.version


def rescored(config: SwapsConfig, published: Mapping[int, Publication], calls: Sequence[Call]) -> dict:
    """How far the answers' log-probabilities are from those of the versions they name, and of the ones beside those."""
    model = load(ServeConfig(model=config.model, admin_port=0))
    assert isinstance(model, VlaModel)
    by_version: dict[int, list[Call]] = defaultdict(list)
    for call in calls:
        if call.what == "act" and call.outcome == ANSWERED and len(by_version[call.version]) < PER_VERSION:
            by_version[call.version].append(call)
    prepared = [
        model.prepare(read_observation(observation(model.spec, robot), model.spec, field=""))
        for robot in range(config.robots)
    ]
    own, other = [], []
    for version, some in sorted(by_version.items()):
        tokens = np.stack([np.frombuffer(call.tokens, "<i4") for call in some])
        said = np.stack([np.frombuffer(call.logprobs, "<f4") for call in some])
        for candidate, found in ((version, own), (version - 1 if version else version + 1, other)):
            weights = built(model, published.get(candidate)) if candidate else model.first
            scored = model.score([prepared[call.robot] for call in some], tokens, 1.0, weights)
            found += np.abs(scored - said).max(axis=1).tolist()
    return {
        "answers": len(own),
        "versions": len(by_version),
        "largest difference": max(own),
        "least of another version's": min(other),
    }


def built(model: VlaModel, publication: Publication | None) -> Weights:
    assert publication is not None, "an answer names a version that was never published"
    with tempfile.TemporaryDirectory() as name:
        publication.save(Path(name))
        return model.build(Path(name), publication.kind)


def gaps_ms(slices: Sequence[Sequence[Call]]) -> np.ndarray:
    """(G, 3): when each gap between two answers of a robot began and ended, s, and how long it was, ms."""
    rows: list[tuple[float, float, float]] = []
    for calls in slices:
        ended_s: dict[int, list[float]] = defaultdict(list)
        for call in calls:
            if call.what == "act" and call.outcome == ANSWERED:
                ended_s[call.robot].append(call.ended_s)
        for moments_s in ended_s.values():
            rows += [(begin, end, 1e3 * (end - begin)) for begin, end in pairwise(sorted(moments_s))]
    return np.array(rows)


def stall(calm_G3: np.ndarray, busy_G3: np.ndarray, moments_s: Sequence[tuple[float, float]]) -> dict[str, dict]:
    """Gaps in which weights were being published, beside those in which none were."""
    begins_s, ends_s = np.array(moments_s).T
    touched_G = np.array([bool(((begins_s < end) & (ends_s > begin)).any()) for begin, end, _ in busy_G3])
    parts = {"calm": calm_G3, "between publications": busy_G3[~touched_G], "while publishing": busy_G3[touched_G]}
    return {name: spread(part[:, 2]) for name, part in parts.items() if len(part)}


def spread(values: Sequence[float] | np.ndarray, digits: int = 1) -> dict[str, float]:
    names, shown = ("p50", "p99", "p99.9", "largest"), np.percentile(values, [50, 99, 99.9, 100])
    return {"n": len(values)} | {name: round(float(one), digits) for name, one in zip(names, shown, strict=True)}


def print_part(part: str, result: dict) -> None:
    print(f"{part}")
    for what, value in result.items():
        print(f"  {what:<36}{value}")


if __name__ == "__main__":
    main(tyro.cli(SwapsConfig, description=__doc__))
