"""The lab of benchmarks/faults: a policy server, a network, a camera, a robot, and a witness of what the robot does.

Server, client (client.py), its servo and the robot are processes of their own, so that one can be stopped or killed
while the others go on.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from benchmarks.faults.client import ClientProcess
from benchmarks.panda import Panda
from protos import policy_pb2
from protos.channel import free_port
from protos.codec import decode_tensor, encode_tensor
from robot_client.cameras.uvc import UvcSource
from robot_client.profile import read_profile
from tests.client.black_hole import BlackHole
from tests.client.scripted_policy import Delay, Running, ScriptedPolicy, Tamper, spec_of
from tests.client.ur_simulator import URSimulator

HERE = Path(__file__).parent
PROFILES = HERE.parents[1] / "docs" / "profiles"
V4L2_DEVICE = HERE.parents[1] / "tests" / "client" / "v4l2_device.c"
WALL_CLOCK = HERE / "wall_clock.c"
CHUNK = 8
"""K of the policy."""
LATE_S = 2.5
"""How late an answer is that comes late."""
SAMPLE_S = 0.004

Manners = Literal["well", "late", "reordered", "NaN", "out of range"]
CameraTrouble = Literal["frozen", "stalled", "unplugged"]


@dataclass(frozen=True, kw_only=True)
class Lab:
    """Everything."""

    policy: PolicyProcess
    network: BlackHole
    client: ClientProcess
    camera: SoftwareCamera
    wall_clock: WallClock
    robot: Robot
    witness: Witness
    hardware: dict[str, Any]
    """Settings of the arm's class."""


@contextlib.contextmanager
def lab_of(arm: str, *, through_network: bool = False) -> Iterator[Lab]:
    """With this arm, its profile of docs/profiles, and a first episode under way.

    through_network: client and server are connected by what can swallow everything, and not directly.
    """
    make = MAKES[arm]
    profile = read_profile(PROFILES / f"{arm}.toml")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        camera, wall_clock = SoftwareCamera(Path(folder)), WallClock(Path(folder))
        libraries = [built(source, Path(folder)) for source in (V4L2_DEVICE, WALL_CLOCK)]
        robot = stack.enter_context(contextlib.closing(make.robot()))
        policy = stack.enter_context(contextlib.closing(PolicyProcess()))
        network = stack.enter_context(contextlib.closing(BlackHole(policy.address)))
        hardware = {**profile.hardware, "host": robot.host, **make.settings}
        client = ClientProcess(
            getattr(import_module(f"robot_client.arms.{arm}"), make.hardware),
            replace(profile, hardware=hardware),
            partial(UvcSource, device=str(camera.device), width=320, height=240, fps=30),
            network.address if through_network else policy.address,
            {"LD_PRELOAD": ":".join(libraries), **camera.environment, **wall_clock.environment},
        )
        stack.enter_context(contextlib.closing(client))
        witness = stack.enter_context(contextlib.closing(Witness(robot)))
        client.next_episode()
        yield Lab(
            policy=policy,
            network=network,
            client=client,
            camera=camera,
            wall_clock=wall_clock,
            robot=robot,
            witness=witness,
            hardware=hardware,
        )


def built(source: Path, folder: Path) -> str:
    """The path of the shared library of a C file."""
    library = folder / f"{source.stem}.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-pthread", "-o", library, source], check=True)
    return str(library)


# The policy server.


def circling(decision: int) -> np.ndarray:
    """Half a unit a tick, sideways and down and back and up, in circles of eight decisions."""
    angle = 2 * math.pi * decision / 8
    return np.array([0.0, 0.5 * math.cos(angle), -0.5 * math.sin(angle), 0.0, 0.0, 0.0, 1.0])


def too_far(decision: int) -> np.ndarray:
    return np.array([0.0, 0.95, 0.0, 0.0, 0.0, 0.0, 1.0])


class Misbehaving(ScriptedPolicy):
    """Leads in circles.  Says that no number of a move is above 0.9, and behaves well until it is told otherwise."""

    def __init__(self) -> None:
        super().__init__(spec_of(chunk_length=CHUNK))
        for dimension in self.spec.action[:3]:
            dimension.low, dimension.high = -0.9, 0.9
        self.tampered_s = 0.0
        self.behave("well")

    def behave(self, manners: Manners) -> None:
        first_tries = {"late": [Delay(LATE_S)] * 9, "reordered": [Delay(LATE_S)] * 2, "NaN": [Tamper(self._put_nan)]}
        self.script = defaultdict(lambda: list(first_tries.get(manners, [])))
        self.action_of = too_far if manners == "out of range" else circling

    def _put_nan(self, reply: policy_pb2.ActReply) -> None:
        actions_KA = decode_tensor(reply.chunk.actions).copy()
        actions_KA[0, 0] = np.nan
        reply.chunk.actions.CopyFrom(encode_tensor(actions_KA))
        self.tampered_s = time.monotonic()


class RunningAt(Running):
    """On a port of our choice."""

    def __init__(self, policy: ScriptedPolicy, port: int):
        self.policy, self._port = policy, port
        self.start()


class PolicyProcess:
    """A scripted policy behind a real socket; once killed it can be started again at the same address."""

    def __init__(self) -> None:
        self._port = free_port()
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._port), name="policy", daemon=True)
        self._process.start()
        theirs.close()
        self._link.recv()

    def behave(self, manners: Manners) -> float:
        """From now on.  Returns when the latest answer that was tampered with went out, on time.monotonic()."""
        self._link.send(manners)
        return self._link.recv()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    close = kill


def _serve(link: Connection, port: int) -> None:
    """The process, until the link breaks."""
    policy = Misbehaving()
    server = RunningAt(policy, port)
    with contextlib.suppress(EOFError):
        while True:
            link.send(policy.tampered_s)
            policy.behave(link.recv())
    server.stop()


# The camera, and the time of day.


class SoftwareCamera:
    """A USB camera as the processes see it that have `environment` and the library of tests/client/v4l2_device.c."""

    def __init__(self, folder: Path):
        self.device = folder / "video0"
        self.environment = {"V4L2_DEVICE": str(self.device)}
        self._plug_in()

    def begin(self, trouble: CameraTrouble) -> None:
        self._file(trouble).touch()
        if trouble == "unplugged":
            self.device.unlink()

    def end(self, trouble: CameraTrouble) -> None:
        self._file(trouble).unlink()
        if trouble == "unplugged":
            self._plug_in()

    def _file(self, trouble: CameraTrouble) -> Path:
        return self.device.with_suffix(f".{trouble}")

    def _plug_in(self) -> None:
        self.device.symlink_to("/dev/null")


class WallClock:
    """The time of day as the processes see it that have `environment` and the library of wall_clock.c."""

    def __init__(self, folder: Path):
        self._file = folder / "wall_clock"
        self._file.write_bytes(bytes(8))
        self.environment = {"WALL_CLOCK": str(self._file)}

    def jump(self, seconds: int) -> None:
        """To so many seconds off."""
        with self._file.open("r+b") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))


# The robot.


class Robot(Protocol):
    host: str

    def state(self) -> dict[str, Any]:
        """position_m (3,): where the tool is; commanded_m (3,): where it was told to be; time_s: of its own clock."""
        ...

    def close(self) -> None: ...


class UR:
    """The controller of tests/client/ur_simulator.py, for two threads."""

    def __init__(self) -> None:
        self._simulator, self._lock = URSimulator(), threading.Lock()
        self.host = self._simulator.host

    def state(self) -> dict[str, Any]:
        return self.do("state") | {"commanded_m": self.do("_numbers", 6)[:3]}  # servoL's registers

    def do(self, name: str, *arguments: Any) -> Any:
        """What only a person at the robot can do."""
        with self._lock:
            return self._simulator(name, *arguments)

    def close(self) -> None:
        self._simulator.close()


@dataclass(frozen=True, kw_only=True)
class Make:
    """One make of arm."""

    robot: Callable[[], Robot]
    hardware: str
    """Name of its class in robot_client/arms/<make>.py."""
    settings: dict[str, Any]
    """Besides those of its profile."""


MAKES = {
    "ur": Make(robot=UR, hardware="URHardware", settings={}),
    "franka": Make(robot=Panda, hardware="FrankaHardware", settings={"realtime": False}),
}


class Witness:
    """Asks the robot for its state every SAMPLE_S, until close()."""

    def __init__(self, robot: Robot):
        self._robot = robot
        self._states: list[tuple[float, dict[str, Any]]] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="witness", daemon=True)
        self._thread.start()

    def states(self, since_s: float, until_s: float) -> list[tuple[float, dict[str, Any]]]:
        """With the time.monotonic() at which they came."""
        return [(at_s, state) for at_s, state in list(self._states) if since_s <= at_s <= until_s]

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closing.wait(SAMPLE_S):
            state = self._robot.state()
            self._states.append((time.monotonic(), state))
