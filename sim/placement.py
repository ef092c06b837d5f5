"""Where fixtures and objects stand at the start: drawn as LIBERO's and robosuite's own reset draws them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

_POSE = {"pos": "0 0 0", "quat": "1 0 0 0"}


@contextmanager
def numpy_generator(state: tuple | dict) -> Iterator[None]:
    """Put numpy's global generator, which LIBERO and robosuite draw from, in a state, and back afterwards."""
    before = np.random.get_state()
    np.random.set_state(state)
    try:
        yield
    finally:
        np.random.set_state(before)


class Placement:
    """Resets an environment built with `hard_reset=False` so that it draws what the stock, hard reset would."""

    def __init__(self, env) -> None:
        self._env = env
        self._model = env.sim.model._model
        self._fixtures = [_built_pose(env, fixture) for fixture in getattr(env, "fixtures_dict", {}).values()]
        self._property_samplers = list(getattr(env, "object_property_initializers", ()))
        # (seed, resets done) -> the generator's state and how many attempts they took
        self._history: dict[tuple[int, int], tuple[tuple | dict, int]] = {}

    def draw(self, seed: int, resets: int = 1) -> None:
        """Leave the environment as the last of so many resets after `seed(seed)` does."""
        done = max((n for s, n in self._history if s == seed and n < resets), default=0)
        generator, attempts = self._history.get((seed, done)) or (np.random.RandomState(seed).get_state(), 0)
        for reset in range(done + 1, resets + 1):
            with numpy_generator(generator):
                attempts = self._reset(attempts)
                generator = np.random.get_state()
            if resets > 1:
                self._history[seed, reset] = generator, attempts

    def _reset(self, attempts: int) -> int:
        """Reset until a placement is found, as the stock wrapper does; returns the attempts so far."""
        from robosuite.utils.errors import RandomizationError

        while True:
            attempts += 1
            # A hard reset starts from the built poses with a new gripper, and adds drawers' samplers once more.
            for body, pos, quat in self._fixtures:
                self._model.body_pos[body], self._model.body_quat[body] = pos, quat
            self._env.robots[0].gripper.current_action = np.zeros(2)
            if self._property_samplers:
                self._env.object_property_initializers = self._property_samplers * (1 + attempts)
            try:
                self._env.reset()
                return attempts
            except RandomizationError:
                continue


def _built_pose(env, fixture) -> tuple[int, np.ndarray, np.ndarray]:
    """A fixture's body id, position (3,) and quaternion (4,) as its file has them, before any draw."""
    name = fixture.root_body
    element = env.model.root.find(f".//body[@name='{name}']")
    pos, quat = (np.array(element.get(key, default).split(), dtype=np.float64) for key, default in _POSE.items())
    return env.sim.model.body_name2id(name), pos, quat / np.linalg.norm(quat)
