"""What a person does between episodes: sets the scene up, clears a fault, lets a stop go, ends the run.

Drivers take rollouts one by one (robot_client/drivers.py), so each of these hands them on when it is time:

    run(arm, once_let_go(guided(rollouts, console, arm.recover), pilot), client, pilot=pilot)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator

from robot_client.errors import ArmError
from robot_client.pilot import Pilot
from robot_client.rollout import Rollout
from robot_client.terminal import Terminal

logger = logging.getLogger(__name__)

GO, RECOVER, QUIT = "\n", "r", "q"
HELP = "Enter: it is set up and nobody is in the arm's way    r: clear the arm's fault    q: end here"
POLL_S = 0.05


def guided(rollouts: Iterable[Rollout], console: Terminal, recover: Callable[[], None]) -> Iterator[Rollout]:
    """Each rollout once a person has set it up and said so.

    recover: clears the arm's fault, only ever at the person's word; may raise ArmError.  Keys that were pressed before
    the question are no answer to it.  Raises PilotError when the terminal is gone.
    """
    for number, rollout in enumerate(rollouts, 1):
        task = rollout.task
        console.keys()
        console.say(f"\nEpisode {number}: {task.instruction}")
        if task.initial_state:
            console.say(f"  starts from: {task.initial_state}")
        console.say(f"  {HELP}")
        while (key := _choice(console)) != GO:
            if key == QUIT:
                return
            console.say(f"  {_recovery(recover)}")
        yield rollout


def once_let_go(rollouts: Iterable[Rollout], pilot: Pilot) -> Iterator[Rollout]:
    """Each rollout once nothing is stopped: to reset an arm is to move it."""
    for rollout in rollouts:
        if stopped := pilot.wish().stopped:
            logger.warning("the arm stays where it is until it is let go: %s", stopped)
            while pilot.wish().stopped:
                time.sleep(POLL_S)
        yield rollout


def _choice(console: Terminal) -> str:
    """The first key that means something, waited for."""
    while True:
        for key in console.keys(timeout_s=None):
            if key in (GO, RECOVER, QUIT):
                return key


def _recovery(recover: Callable[[], None]) -> str:
    """What came of it."""
    try:
        recover()
    except ArmError as error:
        return f"it could not be cleared: {error}"
    return "the fault is cleared, if there was one; Enter goes on"
