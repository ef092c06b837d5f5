"""Which recipe solves which task."""

from __future__ import annotations

from sim.expert import Skill
from sim.expert_skills import Grasp, PickPlace, Place, TurnKnob
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

# Bowls are taken by the rim on the side of +y.
BOWL = Grasp(offset_m=(0.0, 0.049), above_bottom_m=0.028)
BLACK_BOWL = "akita_black_bowl_1_main"
PLATE = Place(target="plate_1_main", carry_m=0.05, release_m=0.005, radius_m=0.02)
CABINET_TOP = Place(target="wooden_cabinet_1_top_side", carry_m=0.05, release_m=0.01, radius_m=0.03)

LIBERO_GOAL: dict[str, Recipe] = {
    "put_the_bowl_on_the_stove": (
        PickPlace(
            body=BLACK_BOWL,
            grasp=BOWL,
            place=Place(target="flat_stove_1_cook_region", carry_m=0.08, release_m=0.03, radius_m=0.03),
        ),
    ),
    "put_the_bowl_on_the_plate": (PickPlace(body=BLACK_BOWL, grasp=BOWL, place=PLATE),),
    "put_the_bowl_on_top_of_the_cabinet": (PickPlace(body=BLACK_BOWL, grasp=BOWL, place=CABINET_TOP),),
    "put_the_wine_bottle_on_top_of_the_cabinet": (PickPlace(body="wine_bottle_1_main", place=CABINET_TOP),),
    "put_the_wine_bottle_on_the_rack": (
        PickPlace(
            body="wine_bottle_1_main",
            place=Place(target="wine_rack_1_top_region", carry_m=0.08, release_m=0.01, radius_m=0.03),
        ),
    ),
    "put_the_cream_cheese_in_the_bowl": (
        PickPlace(
            body="cream_cheese_1_main",
            grasp=FLAT_BOX,
            place=Place(target=BLACK_BOWL, carry_m=0.04, release_m=0.0, radius_m=0.025),
        ),
    ),
    "push_the_plate_to_the_front_of_the_stove": (
        PickPlace(
            body="plate_1_main",
            grasp=Grasp(offset_m=(0.0, 0.055), above_bottom_m=0.01),
            place=Place(target="main_table_stove_front_region", carry_m=0.03, release_m=0.01, radius_m=0.03),
        ),
    ),
    "turn_on_the_stove": (TurnKnob(body="flat_stove_1_button", joint="flat_stove_1_button", enough_rad=0.55),),
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

SPATIAL_PLACES = (
    "between_the_plate_and_the_ramekin",
    "from_table_center",
    "next_to_the_cookie_box",
    "next_to_the_plate",
    "next_to_the_ramekin",
    "on_the_cookie_box",
    "on_the_ramekin",
    "on_the_stove",
    "on_the_wooden_cabinet",
)
LIBERO_SPATIAL: dict[str, Recipe] = {
    f"pick_up_the_black_bowl_{where}_and_place_it_on_the_plate": (PickPlace(body=BLACK_BOWL, grasp=BOWL, place=PLATE),)
    for where in SPATIAL_PLACES
}

RECIPES: dict[str, dict[str, Recipe]] = {
    "libero_object": LIBERO_OBJECT,
    "libero_goal": LIBERO_GOAL,
    "libero_spatial": LIBERO_SPATIAL,
    "robosuite": ROBOSUITE,
}


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
