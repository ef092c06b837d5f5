"""Success by task survives the way into the curve and back; an error is nobody's failure."""

from __future__ import annotations

import math

import pytest

from rl_trainer.tally import Tally, by_task, scalars_of, tally_of, total
from tests.trainer.fake_curve import finished


def test_an_error_is_no_episode() -> None:
    items = [finished("suite/0", letter) for letter in "sfees"]
    assert tally_of(items) == Tally(2, 3)
    assert scalars_of(items, "train") == {"train_successes/suite/0": 2.0, "train_episodes/suite/0": 3.0}


def test_rows_give_back_each_tasks_episodes_in_the_order_of_the_numbers() -> None:
    first = scalars_of([finished("suite/10", "s"), finished("suite/9", "f")], "train")
    second = scalars_of([finished("suite/9", "s"), finished("suite/9", "s")], "train")
    other = scalars_of([finished("suite/9", "s")], "evaluate")
    assert list(by_task([first, second, other], "train").items()) == [
        ("suite/9", Tally(2, 3)),
        ("suite/10", Tally(1, 1)),
    ]
    assert total([first, second, other], "train") == Tally(3, 4) and total([other], "evaluate") == Tally(1, 1)


def test_the_interval_is_wilsons() -> None:
    # z = 1.95996; centre (p + z^2 / 2n) / (1 + z^2 / n) with p = 0.8, n = 10: 0.71674; half width 0.22659.
    assert Tally(8, 10).interval == pytest.approx((0.49016, 0.94333), abs=1e-4)
    assert Tally().interval == (0.0, 1.0) and math.isnan(Tally().rate)
