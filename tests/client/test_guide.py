"""Between episodes a person decides: nothing is reset before the word, no fault is cleared without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from robot_client.arm import Task
from robot_client.drivers import run
from robot_client.errors import ArmError, PilotError
from robot_client.guide import HELP, guided, once_let_go
from robot_client.observer import Observer
from robot_client.pilot import Together, Wish
from robot_client.pilots.keyboard import Keyboard
from robot_client.rollout import Rollout
from robot_client.terminal import Terminal
from tests.client.conftest import rollout_of
from tests.client.fake_arm import FakeArm, spec_of
from tests.client.test_pilot_keyboard import Line


class Desk(Terminal):
    """A pseudo-terminal at which a person answers each question with the next of these keys."""

    def __init__(self, *answers: str):
        self.line = Line()
        super().__init__(self.line.process)
        self.answers = iter(answers)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text.strip())
        if HELP in text or "cleared" in text:
            self.line.type(next(self.answers))

    def leave(self) -> None:
        self.close()
        self.line.close()


@pytest.fixture
def desk():
    desks: list[Desk] = []

    def with_answers(*answers: str) -> Desk:
        desks.append(Desk(*answers))
        return desks[-1]

    yield with_answers
    for each in desks:
        each.leave()


def rollouts(count: int) -> list[Rollout]:
    return [rollout_of(name=f"task {n}", max_ticks=4) for n in range(count)]


def never() -> None:
    raise AssertionError("nobody asked for it")


def test_each_rollout_is_handed_on_after_enter(desk):
    console, wanted = desk("\n", "\n", "\n"), rollouts(3)
    for number, rollout in enumerate(guided(wanted, console, never)):
        assert rollout is wanted[number]
        assert console.said.count(HELP) == number + 1
    assert console.said.count(HELP) == 3


def test_it_says_what_to_set_up(desk):
    console, task = desk("\n"), Task(name="towel", instruction="fold the towel", initial_state="in a heap")
    list(guided([Rollout(task=task)], console, never))
    assert console.said == ["Episode 1: fold the towel", "starts from: in a heap", HELP]


def test_no_other_key_is_a_word(desk):
    assert len(list(guided(rollouts(1), desk("yw 1R\x1b[A\n"), never))) == 1


def test_what_was_typed_before_the_question_is_no_answer_to_it(desk):
    console = desk("q")
    console.line.type("r\n\n")
    assert list(guided(rollouts(1), console, never)) == []


def test_q_ends_and_takes_no_more_work(desk):
    work = iter(rollouts(5))
    assert len(list(guided(work, desk("\n", "q"), never))) == 1
    assert [rollout.task.name for rollout in work] == ["task 2", "task 3", "task 4"]


def test_a_fault_is_cleared_at_the_persons_word_alone_who_is_then_asked_again(desk):
    brakes = ["on", "on"]

    def recover() -> None:
        brakes.pop()
        if brakes:
            raise ArmError("the brakes are on")

    console = desk("\n", "r", "r", "\n")
    given = guided(rollouts(2), console, recover)
    next(given)
    assert len(brakes) == 2
    next(given)
    assert not brakes
    assert console.said[-2:] == [
        "it could not be cleared: the brakes are on",
        "the fault is cleared, if there was one; Enter goes on",
    ]


def test_a_terminal_that_is_gone_hands_nothing_on(desk):
    console = desk()
    console.line.hang_up()
    with pytest.raises(PilotError, match="the terminal is gone"):
        next(guided(rollouts(1), console, never))


# With the driver.


class Script:
    """The wish of each call, the last one for ever; calls something at each."""

    def __init__(self, *stopped: str, at_each: Callable[[], object] = lambda: None):
        self.stopped = list(stopped)
        self.at_each = at_each

    def wish(self) -> Wish:
        self.at_each()
        return Wish(stopped=self.stopped.pop(0) if len(self.stopped) > 1 else self.stopped[0])


def test_no_arm_is_reset_while_it_is_stopped(client, caplog):
    arm, resets = FakeArm(), []
    pilot = Script("the button", "the button", "the button", "", at_each=lambda: resets.append(arm.log.count("reset")))
    [result] = run(arm, once_let_go(rollouts(1), pilot), client, pilot=pilot)
    assert resets[:4] == [0, 0, 0, 0] and resets[-1] == 1
    assert result.ticks == 4 and result.holds == 0
    assert "stays where it is until it is let go: the button" in caplog.text


class Typing(Observer):
    def __init__(self, console: Desk, by_episode: list[str]):
        self.console = console
        self.by_episode = by_episode

    def on_tick(self, state, tick):
        if state.tick == 1 and self.by_episode:
            self.console.line.type(self.by_episode.pop(0))


def test_the_guide_and_the_keyboard_share_one_terminal_in_turn(client, policy, desk):
    """The first episode is said to be a success, the second is not: the guide has its Enter, the pilot its y."""
    console, arm = desk("\n", "\n", "q"), FakeArm(spec_of())
    pilot = Together(arm.spec, [Keyboard(terminal=console)])
    watchers = [pilot, Typing(console, ["y"])]
    work = once_let_go(guided(rollouts(9), console, never), pilot)
    results = list(run(arm, work, client, pilot=pilot, observers=lambda _: watchers))
    assert [(result.outcome, result.ticks) for result in results] == [("success", 2), ("failure", 4)]
