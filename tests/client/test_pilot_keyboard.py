"""The keyboard through a real pseudo-terminal: what is typed, and how the terminal is left."""

from __future__ import annotations

import array
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios

import numpy as np
import pytest

from protos import episode_pb2
from robot_client.drivers import run
from robot_client.errors import PilotError
from robot_client.observer import Observer
from robot_client.pilot import FULL, LINGER_S, Together
from robot_client.pilots import keyboard
from robot_client.pilots.keyboard import MOVE_S, Keyboard
from robot_client.terminal import Terminal
from tests.client.camera_laws import eventually
from tests.client.conftest import HandClock, rollout_of
from tests.client.fake_arm import FakeArm, spec_of

X, Y, Z, ROLL, PITCH, YAW = np.eye(6)


class Line:
    """A pseudo-terminal: the person types at one end, the process reads at the other."""

    def __init__(self):
        self.person, self.process = pty.openpty()
        self.is_up = True

    def hang_up(self) -> None:
        if self.is_up:
            os.close(self.person)
        self.is_up = False

    def close(self) -> None:
        self.hang_up()
        os.close(self.process)

    def type(self, text: str) -> None:
        """Returns once it can be read."""
        before = self.readable
        os.write(self.person, text.encode())
        eventually(lambda: self.readable == before + len(text.encode()))

    @property
    def readable(self) -> int:
        count = array.array("i", [0])
        fcntl.ioctl(self.process, termios.FIONREAD, count)
        return count[0]

    @property
    def is_cooked(self) -> bool:
        """Line by line and echoed, as a shell leaves it to its programs."""
        flags = termios.tcgetattr(self.process)[3]
        return bool(flags & termios.ICANON and flags & termios.ECHO)

    def cook(self) -> None:
        settings = termios.tcgetattr(self.process)
        settings[3] |= termios.ICANON | termios.ECHO
        termios.tcsetattr(self.process, termios.TCSANOW, settings)


@pytest.fixture
def line():
    line = Line()
    yield line
    line.close()


@pytest.fixture
def terminal(line):
    terminal = Terminal(line.process)
    yield terminal
    terminal.close()


@pytest.fixture
def clock(monkeypatch) -> HandClock:
    clock = HandClock()
    monkeypatch.setattr(keyboard, "time", clock)
    return clock


@pytest.fixture
def keys(terminal, clock) -> Keyboard:
    return Keyboard(terminal=terminal)


# Keys.


@pytest.mark.parametrize(
    ("typed", "drive_6"),
    [
        ("w", X),
        ("s", -X),
        ("a", Y),
        ("d", -Y),
        ("r", Z),
        ("f", -Z),
        ("o", ROLL),
        ("u", -ROLL),
        ("i", PITCH),
        ("k", -PITCH),
        ("j", YAW),
        ("l", -YAW),
        ("wwww", X),
        ("wa", X + Y),
        ("wsr", Z),
    ],
)
def test_a_key_drives_along_its_axis(line, keys, typed, drive_6):
    line.type(typed)
    np.testing.assert_array_equal(keys.gesture().drive_6, drive_6)


def test_a_key_drives_for_a_short_time_and_the_policy_waits_a_while_longer(line, keys, clock):
    assert keys.gesture().drive_6 is None
    line.type("w")
    pressed_s = clock.now_s
    driven = {}
    for after_s in (0, MOVE_S - 0.01, MOVE_S + 0.01, LINGER_S - 0.01, LINGER_S + 0.01):
        clock.now_s = pressed_s + after_s
        driven[after_s] = keys.gesture().drive_6
    moving, moving_still, standing, standing_still, over = driven.values()
    assert moving[0] == moving_still[0] == 1
    assert not standing.any() and not standing_still.any() and over is None


def test_repeats_keep_it_moving(line, keys, clock):
    for _ in range(20):
        line.type("a")
        np.testing.assert_array_equal(keys.gesture().drive_6, Y)
        clock.now_s += MOVE_S - 0.05
        np.testing.assert_array_equal(keys.gesture().drive_6, Y)


def test_gripping_is_told_once_and_takes_over(line, keys, clock):
    line.type("g")
    gesture = keys.gesture()
    assert gesture.grips and not gesture.drive_6.any()
    gesture = keys.gesture()
    assert not gesture.grips and not gesture.drive_6.any()


@pytest.mark.parametrize(
    ("typed", "outcome"), [("1", "success"), ("y", "success"), ("0", "failure"), ("n", "failure"), ("x", "error")]
)
def test_an_outcome_is_told_once_and_takes_nothing_over(line, keys, typed, outcome):
    line.type(typed)
    gesture = keys.gesture()
    assert gesture.outcome == outcome and gesture.drive_6 is None
    assert keys.gesture().outcome is None


def test_space_stops_and_enter_lets_go(line, keys):
    line.type(" ")
    assert keys.gesture().stops == "space was pressed"
    gesture = keys.gesture()
    assert not gesture.stops and not gesture.lets_go
    line.type("\n")
    assert keys.gesture().lets_go


def test_what_is_no_key_of_ours_does_nothing(line, keys):
    line.type("qzWASDé^[]~/")
    gesture = keys.gesture()
    assert gesture.drive_6 is None and gesture.outcome is None and not gesture.stops and not gesture.lets_go


@pytest.mark.parametrize("sequence", ["\x1b[A", "\x1bOB", "\x1b[15~", "\x1b[1;5C", "\x1b[[A", "\x1b[20~\x1b[3~"])
@pytest.mark.parametrize("pause", [False, True])
def test_an_arrow_or_a_function_key_is_not_the_keys_it_is_spelt_with(line, terminal, sequence, pause):
    """Also where a slow line brings it in two pieces."""
    heard = ""
    for part in [sequence[:1], sequence[1:2], sequence[2:]] if pause else [sequence]:
        line.type(part)
        heard += terminal.keys()
    line.type("w")
    assert heard + terminal.keys() == "w"


def test_a_stop_right_after_escape_is_a_stop(line, keys):
    line.type("\x1b")
    assert not keys.gesture().stops
    line.type(" ")
    assert keys.gesture().stops


def test_its_keys_are_told_once(terminal, capsys):
    keys = Keyboard(terminal=terminal)
    keys.gesture()
    told = capsys.readouterr().err
    assert told.count("space  STOP; Enter lets go") == 1
    assert all(f" {key} " in told for key in (*keyboard.MOVES, keyboard.GRIP, *keyboard.OUTCOMES))


# The terminal.


def test_keys_are_read_without_enter_and_not_echoed_until_it_is_closed(line, terminal):
    assert not line.is_cooked
    before = termios.tcgetattr(line.process)
    before[3] |= termios.ICANON | termios.ECHO
    terminal.close()
    terminal.close()
    assert line.is_cooked
    with pytest.raises(PilotError, match="the terminal has been closed"):
        terminal.keys()


def test_without_a_terminal_there_are_no_keys(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", "from robot_client.pilots.keyboard import Keyboard; Keyboard()"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "PilotError: keys are read from a terminal, and standard input is none" in ran.stderr


def test_a_terminal_that_is_gone_stops_the_arm(line, keys):
    line.hang_up()
    with pytest.raises(PilotError, match="the terminal is gone"):
        keys.gesture()
    assert Together(spec_of(), [keys]).wish().stopped == "the terminal is gone"


PROGRAM = """
from robot_client.terminal import own_terminal
terminal = own_terminal()
assert own_terminal() is terminal
terminal.say("ready")
terminal.keys(None)
{end}
"""


def start(line: Line, end: str = "") -> subprocess.Popen:
    """Returns when it waits for a key on the line, at which it comes to its end."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(end=end)], stdin=line.process, stderr=subprocess.PIPE, text=True
    )
    assert program.stderr is not None and program.stderr.readline() == "ready\n"
    assert not line.is_cooked
    return program


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_ends_the_process_ends_it_and_the_terminal_is_put_back(line, number):
    program = start(line)
    program.send_signal(number)
    program.communicate(timeout=120)
    assert program.returncode == -number
    assert line.is_cooked


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(3)", "1 / 0"])
def test_however_the_process_ends_the_terminal_is_put_back(line, end):
    program = start(line, end)
    os.write(line.person, b"w")
    program.communicate(timeout=120)
    assert line.is_cooked


def test_what_was_suspended_and_goes_on_reads_keys_again(line, terminal):
    line.cook()
    os.kill(os.getpid(), signal.SIGCONT)
    eventually(lambda: not line.is_cooked)
    line.type("w")
    assert terminal.keys() == "w"


def test_a_closed_terminal_leaves_no_signal_handled(line):
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGCONT)
    before = [signal.getsignal(number) for number in numbers]
    terminal = Terminal(line.process)
    assert [signal.getsignal(number) for number in numbers] != before
    terminal.close()
    assert [signal.getsignal(number) for number in numbers] == before


# In an episode.


class Person(Observer):
    """Types the next of its keys whenever the arm has done for a while what it waits for."""

    def __init__(self, line: Line, plan: list[tuple[int, str]]):
        self.line = line
        self.plan = plan
        self.seen = 0
        self.sources: list[int] = []
        self.reasons: set[str] = set()

    def on_tick(self, state, tick):
        self.sources.append(tick.source)
        self.reasons.add(tick.reason)
        awaited, key = self.plan[0] if self.plan else (None, "")
        self.seen = self.seen + 1 if tick.source == awaited else 0
        if self.seen >= 3:
            self.plan.pop(0)
            self.seen = 0
            self.line.type(key)


def test_a_person_at_the_keyboard_takes_over_stops_lets_go_and_says_how_it_ended(client, policy, line, terminal):
    by_policy, human, hold = episode_pb2.SOURCE_POLICY, episode_pb2.SOURCE_HUMAN, episode_pb2.SOURCE_HOLD
    plan = [(by_policy, "a"), (human, "\x1b[A"), (by_policy, " "), (hold, "\n"), (by_policy, "y")]
    person, arm = Person(line, plan), FakeArm(spec_of(lockstep=False))
    pilot = Together(arm.spec, [Keyboard(terminal=terminal)])
    watchers = [pilot, person]
    [result] = run(arm, [rollout_of(max_ticks=0)], client, pilot=pilot, observers=lambda _: watchers)
    assert (result.outcome, result.terminal, result.message) == ("success", True, "said a person")
    assert {human, hold, by_policy} == set(person.sources)
    assert "stopped: space was pressed" in person.reasons
    driven = [tick.action[1] for tick in policy.only_episode.ticks if tick.source == human]
    assert set(driven) == {0, FULL}
