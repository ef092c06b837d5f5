# pyright: reportAttributeAccessIssue=false
"""Shifted worlds: each changes what it says and nothing else, and stays whatever happens in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import mujoco
import numpy as np
import pytest

from sim.evaluate import EvaluateConfig
from sim.leasing import LeasingConfig
from sim.libero_arm import LiberoArm, build_arm
from sim.scene import Scene
from sim.shifts import SHIFTS, Camera, Distractors, Grip, Light, find_shift
from sim.suites import find_task
from tests.sim.stock import expert_actions
from tests.sim.test_evaluate_libero import ONE_TASK, run, whole_episodes
from tests.sim.wandering_model import WanderingModel

TASK = "libero_goal/1"
"""With fixtures, which resets move, and distractors."""
LAMPS = {"light_pos", "light_dir", "light_diffuse", "light_specular", "headlight"}
CENTRES = {"cam_poscom0", "light_poscom0"}
"""For cameras that follow a centre of mass, which none does here."""
MASSES = {"body_mass", "body_inertia", "body_subtreemass", "body_invweight0", "dof_invweight0", "dof_M0", *CENTRES}
CHANGED = {
    "camera": {"cam_pos", "cam_quat"},
    "light": LAMPS,
    "dark": LAMPS - {"light_pos", "light_dir"},
    "friction": {"geom_friction", *MASSES},
    "objects": {"geom_rgba"},
}
CHANGED["all"] = set().union(*CHANGED.values())
SEEN, FELT = {"camera", "light", "dark", "objects", "all"}, {"friction", "all"}

BENCH = """
<mujoco>
  <asset><material name="white" rgba="1 1 1 1"/></asset>
  <worldbody>
    <light pos="1 1 4" dir="0 -0.6 -0.8" diffuse="0.8 0.8 0.8"/>
    <camera name="agentview" pos="0.5 0 1" quat="0.70710678 0 0 0.70710678"/>
    <camera name="wrist" pos="0 0 1"/>
    <body name="table"><geom name="table" type="box" size="1 1 0.1" friction="1 0.005 0.0001"/></body>
    <body pos="0 1 1"><joint/><geom name="left_pad" size="0.01" friction="2 0.05 0.0001" mass="0.1"/></body>
    <body pos="0 2 1"><joint/><geom name="right_pad" size="0.01" friction="2 0.05 0.0001" mass="0.1"/></body>
    <body name="soup_main" pos="0 0 1">
      <freejoint/>
      <body><geom name="soup" size="0.05" material="white" friction="0.8 0.3 0.1" mass="{soup_kg}"/></body>
    </body>
    <body name="milk_main" pos="0 0 2">
      <freejoint/>
      <body><geom name="milk" size="0.05" material="white" mass="{milk_kg}"/></body>
    </body>
    <body name="butter_main" pos="0 0 3">
      <freejoint/>
      <geom name="butter" size="0.05" rgba="0.5 1 0.2 1" mass="{milk_kg}"/>
    </body>
  </worldbody>
</mujoco>
"""


def bench(soup_kg: float = 0.5, milk_kg: float = 1.0) -> SimpleNamespace:
    """An environment as far as a shift looks at one: the task names the soup; milk and butter are distractors."""
    model = mujoco.MjModel.from_xml_string(BENCH.format(soup_kg=soup_kg, milk_kg=milk_kg))
    pads = {"left_fingerpad": ["left_pad"], "right_fingerpad": ["right_pad"]}
    return SimpleNamespace(
        sim=SimpleNamespace(model=SimpleNamespace(_model=model)),
        robots=[SimpleNamespace(gripper=SimpleNamespace(important_geoms=pads))],
        objects_dict={name: SimpleNamespace(root_body=f"{name}_main") for name in ("soup", "milk", "butter")},
        obj_of_interest=["soup", "stove_cook_region"],
    )


def test_the_camera_moves_along_the_worlds_axes_and_turns_about_its_own() -> None:
    env = bench()
    Camera(move_m=(0.0, 0.03, 0.02), turn_deg=(0.0, 90.0, 0.0)).apply(env)
    camera = env.sim.model._model.camera("agentview")
    np.testing.assert_allclose(camera.pos, [0.5, 0.03, 1.02])
    # It looked down with its right along the world's y; panned to its own left, it looks along -y.
    ahead = np.zeros(3)
    mujoco.mju_rotVecQuat(ahead, np.array([0.0, 0.0, -1.0]), camera.quat)
    np.testing.assert_allclose(ahead, [0, -1, 0], atol=1e-7)
    assert env.sim.model._model.camera("wrist").pos.tolist() == [0, 0, 1]


def test_a_quarter_turn_brings_a_lamp_to_the_next_side() -> None:
    env = bench()
    Light(colour=(0.5, 0.25, 1.0), turn_deg=90.0).apply(env)
    model = env.sim.model._model
    np.testing.assert_allclose(model.light_pos, [[-1, 1, 4]], atol=1e-12)
    np.testing.assert_allclose(model.light_dir, [[0.6, 0, -0.8]], atol=1e-12)
    np.testing.assert_allclose(model.light_diffuse, [[0.4, 0.2, 0.8]], rtol=1e-6)
    # MuJoCo's own headlight: 0.4 diffuse, 0.1 ambient.
    np.testing.assert_allclose(model.vis.headlight.diffuse, [0.2, 0.1, 0.4], rtol=1e-6)
    np.testing.assert_allclose(model.vis.headlight.ambient, [0.05, 0.025, 0.1], rtol=1e-6)


def test_what_can_be_carried_is_as_if_it_had_been_built_heavier() -> None:
    env, heavier = bench(), bench(soup_kg=1.0, milk_kg=2.0).sim.model._model
    Grip(friction=0.5, mass=2.0).apply(env)
    for name in sorted(MASSES):
        np.testing.assert_allclose(getattr(env.sim.model._model, name), getattr(heavier, name), err_msg=name)


def test_the_carried_and_the_pads_are_smoother_and_nothing_else_is() -> None:
    env = bench()
    Grip(friction=0.5, mass=2.0).apply(env)
    friction = {name: env.sim.model._model.geom(name).friction for name in ("soup", "left_pad", "right_pad", "table")}
    np.testing.assert_allclose(friction["soup"], [0.4, 0.15, 0.05])
    np.testing.assert_allclose(friction["left_pad"], [1, 0.025, 0.00005])
    np.testing.assert_allclose(friction["right_pad"], friction["left_pad"])
    np.testing.assert_allclose(friction["table"], [1, 0.005, 0.0001])


def test_a_heavier_world_is_drawn_with_the_same_clipping_planes_wherever_its_fixtures_stand() -> None:
    env = bench()
    model = env.sim.model._model
    extent, center = model.stat.extent, model.stat.center.copy()
    model.body("table").pos[:] = [3, 0, 0]  # as a reset places a fixture
    Grip(friction=0.5, mass=2.0).apply(env)
    assert model.stat.extent == extent and np.array_equal(model.stat.center, center)


def test_distractors_have_their_colours_dimmed_in_turn_and_what_the_task_names_keeps_its_own() -> None:
    env = bench()
    Distractors(tint=0.7).apply(env)
    rgba = {name: env.sim.model._model.geom(name).rgba for name in ("soup", "milk", "butter")}
    np.testing.assert_allclose(rgba["milk"], [1, 0.3, 0.3, 1], rtol=1e-6)  # white, by its material, turned to red
    np.testing.assert_allclose(rgba["butter"], [0.15, 1, 0.06, 1], rtol=1e-6)  # turned to green
    assert np.array_equal(rgba["soup"], bench().sim.model._model.geom("soup").rgba)


def test_a_task_without_distractors_is_refused() -> None:
    env = bench()
    env.obj_of_interest = ["soup", "milk", "butter"]
    with pytest.raises(ValueError, match="distractors must be there"):
        Distractors(tint=0.7).apply(env)
    with pytest.raises(ValueError, match="distractors must be there"):
        Scene(find_task("robosuite/0"), shift=SHIFTS["objects"])


@pytest.mark.parametrize(
    "ask",
    [
        find_shift,
        lambda name: EvaluateConfig(shift=name),
        lambda name: LeasingConfig(shift=name),
        lambda name: build_arm(task_id="robosuite/0", shift=name),
    ],
    ids=["find_shift", "evaluate", "worker", "arm"],
)
def test_an_unknown_name_is_refused_with_the_names_there_are(ask: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"\['all', 'camera', 'dark', 'friction', 'light', 'objects'\], got 'dusk'"):
        ask("dusk")


@pytest.fixture(scope="module")
def plain() -> Iterator[Scene]:
    """The world as it is."""
    scene = Scene(find_task(TASK))
    yield scene
    scene.close()


@pytest.fixture(scope="module", params=list(SHIFTS))
def shifted(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """The same in each shifted world."""
    scene = Scene(find_task(TASK), shift=SHIFTS[request.param])
    yield scene
    scene.close()


@pytest.fixture(scope="module")
def grasp(plain: Scene) -> list[np.ndarray]:
    """Actions that take hold of the bowl in the world as it is."""
    plain.reset("40")
    actions = []
    for action in expert_actions(plain, 60):
        plain.step(action)
        actions.append(action)
    return actions


class Seen(NamedTuple):
    """What an episode looked like, and how all moved."""

    first: np.ndarray
    last: np.ndarray
    path: np.ndarray


def play(scene: Scene, actions: list[np.ndarray]) -> Seen:
    """An episode of those actions."""
    scene.reset("40")
    first, path = scene.render("agentview", 128, 128), []
    for action in actions:
        scene.step(action)
        path.append(scene.data.qpos.copy())
    return Seen(first, scene.render("agentview", 128, 128), np.array(path))


def differing(one: mujoco.MjModel, other: mujoco.MjModel) -> set[str]:
    """Names of what differs between two models."""
    found, expected = contents(one), contents(other)
    return {name for name, array in found.items() if not np.array_equal(array, expected[name])}


def contents(model: mujoco.MjModel) -> dict[str, np.ndarray]:
    """All of a model that a shift could reach."""
    arrays = {name: getattr(model, name) for name in dir(model)}
    head, stat = model.vis.headlight, model.stat
    return {
        **{name: array for name, array in arrays.items() if isinstance(array, np.ndarray)},
        "headlight": np.concatenate([head.ambient, head.diffuse, head.specular]),
        "stat": np.array([stat.extent, *stat.center]),
    }


@pytest.mark.libero
def test_a_shift_changes_what_it_says_and_nothing_else(plain: Scene, shifted: Scene, grasp: list[np.ndarray]) -> None:
    """In the model, after two episodes, and in what is seen and what is felt."""
    assert shifted.shift is not None
    name = shifted.shift.name
    for _ in range(2):
        usual, unusual = play(plain, grasp), play(shifted, grasp)
        assert differing(plain.model, shifted.model) == CHANGED[name]
        seen = np.abs(usual.first.astype(int) - unusual.first).mean()
        felt_m = np.abs(usual.path - unusual.path).max()
        assert seen > 1 if name in SEEN else seen < 0.05  # objects settle before the first frame, by 0.1 mm otherwise
        assert felt_m > 0.001 if name in FELT else felt_m == 0


@pytest.mark.libero
def test_the_same_shift_gives_the_same_episodes_bit_for_bit(shifted: Scene, grasp: list[np.ndarray]) -> None:
    """Again in its scene, after another one that was left and taken up again, and in another scene."""
    first = play(shifted, grasp)
    shifted.reset("fresh:3")
    left = shifted.save()
    shifted.reset("41")
    shifted.restore(left)
    shifted.step(grasp[0])
    again = play(shifted, grasp)
    other = Scene(shifted.task, shift=shifted.shift)
    elsewhere = play(other, grasp)
    other.close()
    for episode in (again, elsewhere):
        assert all(np.array_equal(one, two) for one, two in zip(first, episode, strict=True))


@pytest.mark.libero
def test_an_arm_names_the_world_it_is_in(plain: Scene, shifted: Scene) -> None:
    usual, unusual = (LiberoArm(scene=scene, image_sizes={"agentview": (64, 64)}).spec for scene in (plain, shifted))
    assert shifted.shift is not None
    assert unusual.asset_tree == f"{usual.asset_tree}+shift:{shifted.shift.name}"
    assert "shift" not in usual.asset_tree


@pytest.mark.libero
def test_an_evaluation_names_the_world_in_its_report_and_in_every_episode(tmp_path: Path) -> None:
    config = replace(ONE_TASK, shift="light", episodes_per_task=2)
    report = run(WanderingModel(), config, tmp_path, ticks=8)
    assert report.rate.n == 2
    assert report.assets.endswith("+shift:light") and "+shift:light" in report.table().splitlines()[0]
    trees = [episode.start.asset_tree for episode in whole_episodes(tmp_path).values()]
    assert len(trees) == 2 and all(tree.endswith("+shift:light") for tree in trees)
