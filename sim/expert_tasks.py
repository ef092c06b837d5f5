"""Which recipe solves which task."""

from __future__ import annotations

from sim.expert import Grasp, PickPlace, Place, Skill
from sim.suites import Suite, Task

Recipe = tuple[Skill, ...]

# Flat boxes are taken behind their middle: the hand, 20 cm wide, would land on their neighbours.
FLAT_BOX = Grasp(offset_m=(-0.02, 0.0))
UPRIGHT = Grasp()
BASKET = Place(target="basket_1_main", carry_m=0.05, release_m=-0.08, radius_m=0.05, near_m=0.03)


def _into_basket(name: str, grasp: Grasp = UPRIGHT) -> dict[str, Recipe]:
    recipe = (PickPlace(body=f"{name}_1_main", grasp=grasp, place=BASKET),)
    return {f"pick_up_the_{name}_and_place_it_in_the_basket": recipe}


LIBERO_OBJECT: dict[str, Recipe] = {
    **_into_basket("alphabet_soup"),
    **_into_basket("cream_cheese", FLAT_BOX),
    **_into_basket("salad_dressing"),
    **_into_basket("bbq_sauce"),
    **_into_basket("ketchup"),
    **_into_basket("tomato_sauce"),
    **_into_basket("butter", FLAT_BOX),
    **_into_basket("milk"),
    **_into_basket("chocolate_pudding", FLAT_BOX),
    **_into_basket("orange_juice"),
}

ROBOSUITE: dict[str, Recipe] = {
    "Lift": (PickPlace(body="cube_main"),),
    "Stack": (
        PickPlace(
            body="cubeA_main",
            place=Place(target="cubeB_main", carry_m=0.04, release_m=0.005, radius_m=0.012, near_m=0.006),
        ),
    ),
    "PickPlaceCan": (
        PickPlace(
            body="Can_main",
            # The middle of its compartment is at the end of the arm's reach.
            place=Place(
                target="VisualCan_default_site",
                offset_m=(-0.05, -0.06),
                carry_m=0.08,
                release_m=-0.03,
                radius_m=0.04,
                near_m=0.02,
            ),
        ),
    ),
}

RECIPES: dict[str, dict[str, Recipe]] = {"libero_object": LIBERO_OBJECT, "robosuite": ROBOSUITE}


def recipe_for(task: Task) -> Recipe:
    """The task's recipe; ValueError names the tasks of its suite that have one."""
    recipes = RECIPES.get(task.suite, {})
    if task.name not in recipes:
        raise ValueError(f"no expert for {task.id} ({task.name}); its suite has experts for {sorted(recipes)}")
    return recipes[task.name]


def experts_of(suite: Suite) -> tuple[Task, ...]:
    """The suite's tasks that have a recipe; ValueError when none has."""
    able = tuple(task for task in suite.tasks if task.name in RECIPES.get(suite.name, {}))
    if not able:
        raise ValueError(f"no experts for {suite.name}; there are experts for {sorted(RECIPES)}")
    return able
