"""The doctor: a planted fault of each kind is found, and what to do is said; of a healthy set-up nothing is."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from robot_client import doctor as doctor_module
from robot_client.cadence import Cadence
from robot_client.camera import Frame
from robot_client.doctor import CHECKS, Doctor, Finding, Patient, doctor, findings
from robot_client.hardware import Reading
from robot_client.real_arm import RealArm, RealArmConfig
from tests.client.fake_camera import FakeSource
from tests.client.fake_hardware import FakeHardware
from tests.client.scripted_policy import Running, ScriptedPolicy
from tests.client.test_real_server import ScriptedModel
from tests.server.running import serving

PROFILE = """
arm = "fake"
tick_rate_hz = 20.0
[hardware]
rate_hz = 100.0
[home]
joints_rad = [0.0, -0.5, 0.5]
[workspace]
low_m = [0.3, -0.2, 0.1]
high_m = [0.7, 0.2, 0.5]
"""
CAMERA = "agentview=planted,crop=square"
TIMED = {"arm", "servo", "clock", "network", "policy"}
"""These warn on a computer that is too busy, which a test may run on."""


class Robot(FakeHardware):
    """Writes down what it was told, and is slow to read."""

    def __init__(self, *, log: str = "", read_s: float = 0.0, realtime: bool = False, **settings):
        self._file, self._read_s = log, read_s
        super().__init__(**settings)

    def read(self) -> Reading:
        time.sleep(self._read_s)
        return super().read()

    def close(self) -> None:
        super().close()
        if self._file:
            Path(self._file).write_text(" ".join(self.log))


class Source(FakeSource):
    def __init__(self, *, device: str = "", fps: float = 50.0, real_fps: float = 0.0, unplugged: bool = False):
        super().__init__(fps=real_fps or fps)
        self.frozen, self.unplugged, self.level = device == "frozen", unplugged, {"dark": 8, "covered": 1}.get(device)

    def read(self, timeout_s: float) -> Frame:
        frame = super().read(timeout_s)
        if self.level is None:
            return frame
        noise = self._noise.integers(0, 2 * self.level + 1, frame.image.shape, np.uint8)
        return Frame(image=noise, capture_time_ns=frame.capture_time_ns, number=frame.number)


def build_arm(config: RealArmConfig) -> RealArm:
    return RealArm.of("fake", Robot, config)


@pytest.fixture(autouse=True)
def installed(offer, monkeypatch):
    """A package that offers an arm and cameras, as far as Python's own machinery can tell."""
    offer(
        "[vla_rl.arms]\n"
        "fake = tests.client.test_doctor:build_arm\n"
        "bare = tests.client.no_such_module:build_arm\n"
        "[vla_rl.cameras]\n"
        "planted = tests.client.test_doctor:Source\n"
        "bare = tests.client.fake_camera:SourceWithoutItsSdk\n"
    )
    monkeypatch.setattr(doctor_module, "WATCH_S", 0.5)
    monkeypatch.setattr(doctor_module, "CALLS", 5)


@pytest.fixture
def flags(tmp_path) -> Callable[..., list[str]]:
    def written(*changes: tuple[str, str], camera: str = CAMERA) -> list[str]:
        """Of a lab like PROFILE, but for some lines."""
        text = PROFILE
        for line, planted in changes:
            assert line in text
            text = text.replace(line, planted)
        (tmp_path / "lab.toml").write_text(text)
        return ["--profile", str(tmp_path / "lab.toml"), "--camera", camera]

    return written


@pytest.fixture
def found(server: Running) -> Iterator[Callable[..., list[Finding]]]:
    with ExitStack() as stack:

        def look(names: str, flags: Sequence[str] = (), **changes) -> list[Finding]:
            """What the last of these checks finds."""
            patient = Patient(Doctor(**{"arm": "fake", "server": server.address, **changes}), flags, stack)
            return [list(findings(CHECKS[name], patient)) for name in names.split()][-1]

        yield look


def test_of_a_healthy_set_up_nothing_is_found_nothing_moves_and_nothing_is_kept(tmp_path, flags, capsys):
    log = tmp_path / "log"
    with serving(ScriptedModel(), episodes=tmp_path / "episodes") as server:
        told = flags(("[hardware]", f'[hardware]\nlog = "{log}"'))
        assert doctor(Doctor(arm="fake", server=server.address, record=tmp_path / "here"), told) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert list(dict.fromkeys(name for _, name, _ in lines)) == list(CHECKS)
    assert {name for verdict, name, _ in lines if verdict != "ok"} <= TIMED
    assert "an observation takes" in lines[-2][2]
    assert log.read_text() == "close"
    assert not list((tmp_path / "episodes").glob("*.episode")) and not (tmp_path / "here").exists()


def test_a_fault_stops_only_what_depends_on_it(tmp_path, flags, capsys):
    told = [*flags(camera="agentview=planted:away,unplugged=true"), "--camera", "wrist=planted"]
    assert doctor(Doctor(arm="fake", server="127.0.0.1:1", record=tmp_path), told) == 1
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    failed = [(name, text) for verdict, name, text in lines if verdict == "FAIL"]
    assert [name for name, _ in failed] == ["cameras", "network"]
    assert failed[0][1] == "camera agentview: nothing is plugged in; plug it in, or mend its --camera"
    assert failed[1][1].endswith("start the server (python -m policy_server serve), or mend --server")
    assert ["warn", "policy", "not judged: it needs what failed above"] in lines
    assert {name for verdict, name, _ in lines if verdict == "ok"} >= {"packages", "profile", "cameras", "disk"}
    assert any(name == "arm" and text.startswith("at [0.5, 0.0, 0.3] m") for _, name, text in lines)
    assert any(name == "images" and text.startswith("wrist: 64x48") for _, name, text in lines)


def test_an_arm_without_a_profile_is_asked_for_what_any_arm_can_say(server, tmp_path, capsys):
    assert doctor(Doctor(server=server.address, record=tmp_path), ["--size", "64"]) == 0
    printed = capsys.readouterr().out
    assert "kinematic needs none" in printed and "agentview: 64x64" in printed and "at [-0.2, 0.0, 1.15] m" in printed
    assert "FAIL" not in printed and "fits kinematic" in printed


def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it(found):
    ((verdict, text),) = found("packages", arm="bare")
    assert verdict == "FAIL" and "no_such_module" in text and "pip install 'vla-rl[bare]'" in text
    ((verdict, text),) = found("packages", arm="hexapod")
    assert verdict == "FAIL" and "arm must be one of" in text and "see --arm" in text


@pytest.mark.parametrize(
    ("line", "planted", "verdict", "sentence"),
    [
        ("[home]", "[hom]", "FAIL", "got ['hom']; mend it in --profile"),
        ("rad = [0.0, -0.5, 0.5]", "rad = 3", "FAIL", "home.joints_rad must be a list of numbers, got 3; mend it"),
        (
            "[home]",
            "[motion]\njoints_low_rad = [-1, 0, -1]\njoints_high_rad = [1, 1, 1]\n[home]",
            "FAIL",
            "[motion] rules out joints [2] at home: change joints_rad",
        ),
        (
            "[home]",
            "[motion]\njoints_low_rad=[-1]\njoints_high_rad=[1]\n[home]",
            "FAIL",
            "[motion] limits 1: limit each",
        ),
        (
            "[home]",
            "[scale]\nmetres = 0.05\n[home]",
            "warn",
            "longest step is 1 m/s and 1 rad/s; [motion] allows 0.25 m/s",
        ),
        (
            "tick_rate_hz = 20.0",
            "tick_rate_hz = 30.0",
            "warn",
            "longest step is 0.3 m/s and 1.5 rad/s; [motion] allows",
        ),
    ],
)
def test_what_is_wrong_with_a_profile_is_named_by_its_entry(found, flags, line, planted, verdict, sentence):
    ((got, text),) = found("profile", flags((line, planted)))
    assert got == verdict and sentence in text


@pytest.mark.parametrize(
    ("camera", "verdict", "sentence"),
    [
        ("agentview=planted:frozen", "FAIL", "frozen: "),
        ("agentview=planted,unplugged=true", "FAIL", "nothing is plugged in; plug it in, or mend its --camera"),
        ("agentview=planted,zoom=2", "FAIL", "got ['zoom']; plug it in, or mend its --camera"),
        ("agentview=webcam", "FAIL", "got 'webcam'; see its --camera"),
        ("agentview=bare", "FAIL", "pip install 'vla-rl[bare]'; see its --camera"),
        ("agentview=planted,fps=100,real_fps=20", "warn", "100 are due: more light"),
        ("agentview=planted,fps=5", "warn", "20 are due: more light"),
    ],
)
def test_a_camera_that_shows_too_little_is_named_with_why(found, flags, camera, verdict, sentence):
    assert any(got == verdict and sentence in text for got, text in found("cameras", flags(camera=camera)))


@pytest.mark.parametrize(
    ("device", "verdict", "remedy"),
    [("", "ok", "deviation 74"), ("dark", "warn", "dark: light the scene"), ("covered", "FAIL", "take its cap off")],
)
def test_a_picture_that_shows_nothing_is_found(found, flags, device, verdict, remedy):
    ((got, text),) = found("cameras images", flags(camera=f"agentview=planted:{device}"))
    assert got == verdict and text.startswith("agentview: 64x48, ") and remedy in text


def failures(found: list[Finding]) -> list[str]:
    return [text for verdict, text in found if verdict == "FAIL"]


def test_an_arm_outside_its_workspace_is_shown_where_it_is_and_where_it_may_be(found, flags):
    (text,) = failures(found("arm", flags(("low_m = [0.3,", "low_m = [0.6,"))))
    assert "at [0.5, 0.0, 0.3] m in a workspace of (0.6, -0.2, 0.1)" in text
    assert text.endswith("outside: bring it in, or mend [workspace] or [frame]")


def test_the_workspace_is_the_policys(found, flags):
    """The robot's base stands a metre off in the policy's world."""
    (text,) = failures(found("arm", flags(("[home]", "[frame]\nbase_m = [1.0, 0.0, 0.0]\n[home]"))))
    assert "at [1.5, 0.0, 0.3] m" in text


def test_an_arm_that_cannot_be_reached_or_has_a_fault_says_so_in_its_own_words(found, flags, tmp_path):
    ((verdict, text),) = found("arm", flags(("[hardware]", '[hardware]\nrefuse = "no route to host"')))
    assert verdict == "FAIL" and "no route to host; switch it on" in text
    file = tmp_path / "fault"
    file.write_text("protective stop")
    ((verdict, text),) = found("arm", flags(("[hardware]", f'[hardware]\nfault_file = "{file}"')))
    assert verdict == "FAIL" and text.startswith("fake: protective stop; ") and file.exists()


def test_another_robots_profile_is_refused_when_the_robot_is_asked(found, flags):
    ((verdict, text),) = found("profile arm", flags(("[0.0, -0.5, 0.5]", "[0.0, 0.0]")))
    assert verdict == "FAIL" and text == "home.joints_rad must have 3 angles, got 2; mend it in --profile"


def test_a_robot_that_is_slow_to_read_is_found(found, flags):
    """It takes 0.1 s of each tick of 0.05 s, and of each period of 0.01 s."""
    told = flags(("[hardware]", "[hardware]\nread_s = 0.1"))
    ((verdict, text),) = found("arm", told)
    assert verdict == "warn" and text.endswith("ms to read (99 %); of a tick of 50 ms: free this computer")
    assert [verdict for verdict, _ in found("servo", told)] == ["warn", "warn"]


def test_a_servo_below_the_tick_rate_is_found(found, flags):
    texts = [text for verdict, text in found("servo", flags(("rate_hz = 100.0", "rate_hz = 8.0"))) if verdict == "warn"]
    assert "a tick is 50 ms: raise hardware.rate_hz" in texts[-1]


def test_a_loop_that_wakes_late_is_found(found, flags, monkeypatch):
    monkeypatch.setattr(doctor_module, "Cadence", partial(Cadence, sleep=lambda pause_s: time.sleep(pause_s + 0.03)))
    ((verdict, text),) = found("clock", flags())
    assert verdict == "warn" and "a tick is 50 ms: free this computer" in text


def test_a_wall_clock_that_jumps_is_found(found, flags, monkeypatch):
    jumps_at_s, wall_s = time.monotonic() + 0.25, time.time
    monkeypatch.setattr(time, "time", lambda: wall_s() + (time.monotonic() > jumps_at_s) * 0.5)
    found_there = found("clock", flags())
    assert any(verdict == "warn" and "let the time service settle" in text for verdict, text in found_there)


def test_a_kernel_that_the_arm_does_not_want_is_found(found, flags, monkeypatch):
    told = flags(("[hardware]", "[hardware]\nrealtime = true"))
    monkeypatch.setattr(platform, "version", lambda: "#1 SMP PREEMPT_RT")
    assert found("clock", told)[-1][0] == "ok"
    monkeypatch.setattr(platform, "version", lambda: "#1 SMP")
    monkeypatch.setattr(doctor_module, "REALTIME_SIGN", Path("/nowhere"))
    verdict, text = found("clock", told)[-1]
    assert verdict == "FAIL" and text.endswith("boot one (PREEMPT_RT), or state hardware.realtime = false")


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:1", "start the server (python -m policy_server serve), or mend --server"),
        ("localhost:http", "a server address must be HOST:PORT"),
    ],
)
def test_a_server_that_is_not_there_is_found(found, flags, address, sentence):
    ((verdict, text),) = found("network", flags(), server=address)
    assert verdict == "FAIL" and sentence in text


class FarPolicy(ScriptedPolicy):
    def GetSpec(self, request, context):
        time.sleep(0.06)
        return super().GetSpec(request, context)


def test_a_server_that_is_far_away_is_found_with_what_hides_it(found, flags):
    server = Running(FarPolicy())
    verdict, text = found("network", flags(), server=server.address)[-1]
    assert verdict == "warn" and text.startswith("a call takes ") and text.endswith("ask --ahead-ticks None")
    server.stop()


def test_what_does_not_fit_the_policy_is_a_finding_each_with_what_to_do(found, flags, policy):
    policy.spec.tick_rate_hz = 10.0
    images, rate = found("policy", flags(camera="front=planted"))
    assert images == (
        "FAIL",
        "images: the policy reads ['agentview'], fake offers ['front']; "
        "name the cameras as the policy does: --camera NAME=...",
    )
    assert rate[0] == "FAIL" and "trained at 10 Hz, fake ticks at 20 Hz; state the policy's rate" in rate[1]


def test_a_picture_of_another_shape_is_found(found, flags):
    squeezed = [
        text for verdict, text in found("cameras policy", flags(camera="agentview=planted")) if verdict == "warn"
    ]
    assert squeezed[0] == "agentview: 64x48 is squeezed to 16x16; see crop=square"


def test_a_policy_fits_an_arm_that_is_switched_off(found, flags):
    """The profile says all that is needed."""
    ((verdict, text),) = found(
        "policy", flags(("[hardware]", '[hardware]\nrefuse = "off"'), camera="agentview=planted")
    )
    assert (verdict, text) == ("ok", "version 1 fits fake")


def test_a_disk_that_cannot_take_episodes_is_found(found, flags, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    ((verdict, text),) = found("disk", record=tmp_path / "file" / "episodes")
    assert verdict == "FAIL" and "Not a directory; make room, mount its disk, or take another --record" in text
    ((verdict, text),) = found("disk", record=tmp_path / "usb" / "lab" / "episodes")
    assert verdict == "warn" and text.endswith(f"of it only {tmp_path} is there: is its disk mounted?")
    for free, expected in ((20 * 2**30, "ok"), (5 * 2**30, "warn"), (2**29, "FAIL")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(2**40, 0, free))
        ((verdict, text),) = found("disk", record=tmp_path)
        assert verdict == expected and text.startswith(f"{free / 2**30:.1f} GiB are free for {tmp_path}")


def test_a_disk_is_needed_here_only_for_what_the_server_does_not_keep(found, policy):
    ((_, text),) = found("disk")
    assert "GiB are free for" in text
    policy.spec.stores_episodes = True
    assert found("disk") == [("ok", "the server keeps the episodes")]
