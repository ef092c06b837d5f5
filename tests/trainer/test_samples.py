from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rl_trainer.demonstrations import Demonstration
from rl_trainer.samples import Samples, collect_samples, held_out, norm_statistics


def demonstration(name: str, actions_TA: np.ndarray, *, stride: int = 2) -> Demonstration:
    tick_D = np.arange(0, len(actions_TA), stride)
    return Demonstration(
        name=name,
        instruction=f"do {name[0]}",
        frames_DHW3=np.random.default_rng(len(name)).integers(0, 256, (len(tick_D), 4, 6, 3), np.uint8),
        state_DS=np.ones((len(tick_D), 3), np.float32) * tick_D[:, None],
        tick_D=tick_D,
        actions_TA=actions_TA.astype(np.float32),
        led_T=np.ones(len(actions_TA), bool),
        state_names=(),
        tick_rate_hz=20.0,
    )


def collect(folder: Path, *demonstrations: Demonstration, validation_fraction: float = 0.0) -> Samples:
    return collect_samples(
        demonstrations,
        folder / "frames",
        prepare=lambda frame: frame,
        chunk_length=2,
        validation_fraction=validation_fraction,
    )


def test_statistics_are_those_counted_by_hand() -> None:
    motion = np.arange(101.0)  # quantiles fall on the numbers themselves
    actions = np.column_stack([motion, motion > 50])
    statistics = norm_statistics([actions[:40], actions[40:]], [np.array([[1.0]]), np.array([[3.0]])])
    assert statistics["action"]["q01"] == [1.0, 0.0] and statistics["action"]["q99"] == [99.0, 1.0]
    assert statistics["action"]["min"] == [0.0, 0.0] and statistics["action"]["max"] == [100.0, 1.0]
    assert statistics["action"]["mean"][0] == 50.0
    assert statistics["action"]["mask"] == [True, False]
    assert statistics["proprio"]["mean"] == [2.0] and statistics["proprio"]["std"] == [1.0]
    assert (statistics["num_transitions"], statistics["num_trajectories"]) == (101, 2)


def test_the_split_depends_on_an_episode_and_nothing_else() -> None:
    names = [f"episode-{i}" for i in range(2000)]
    held = [name for name in names if held_out(name, 0.1)]
    assert 140 < len(held) < 260
    assert set(held) < {name for name in names if held_out(name, 0.3)}
    assert not any(held_out(name, 0.0) for name in names)


def test_held_out_episodes_shape_no_statistics(tmp_path: Path) -> None:
    taught = next(name for name in map(str, range(100)) if not held_out(name, 0.5))
    held = next(name for name in map(str, range(100)) if held_out(name, 0.5))
    samples = collect(
        tmp_path,
        demonstration(taught, np.ones((4, 2))),
        demonstration(held, np.full((4, 2), 9.0)),
        validation_fraction=0.5,
    )
    assert samples.statistics["action"]["max"] == [1.0, 1.0]
    assert samples.validation_n.tolist() == [False, False, True, True]


def test_every_row_has_its_own_frame_state_label_and_instruction(tmp_path: Path) -> None:
    first, second = demonstration("a", np.arange(10.0).reshape(5, 2)), demonstration("bb", np.ones((4, 2)))
    samples = collect(tmp_path, first, second)
    np.testing.assert_array_equal(samples.frames(), np.concatenate([first.frames_DHW3, second.frames_DHW3]))
    assert samples.state_nS[:, 0].tolist() == [0, 2, 4, 0, 2]
    assert samples.actions_nKA[1].tolist() == [[4, 5], [6, 7]]
    assert [samples.instructions[i] for i in samples.instruction_n] == ["do a"] * 3 + ["do b"] * 2


def test_what_an_expert_only_watched_is_left_out_of_rows_and_statistics(tmp_path: Path) -> None:
    led_T = np.array([False, False, False, True, True, True, True, True])
    actions = np.where(led_T[:, None], 1.0, 7.0) * np.ones((8, 2))
    samples = collect(tmp_path, replace(demonstration("a", actions), led_T=led_T))
    assert samples.state_nS[:, 0].tolist() == [4, 6]
    assert samples.statistics["action"]["max"] == [1.0, 1.0]


def test_other_demonstrations_have_another_fingerprint(tmp_path: Path) -> None:
    one, other = demonstration("a", np.ones((4, 2))), demonstration("b", np.ones((4, 2)))
    assert collect(tmp_path, one).fingerprint == collect(tmp_path, one).fingerprint
    assert collect(tmp_path, one).fingerprint != collect(tmp_path, one, other).fingerprint


def test_demonstrations_that_do_not_fit_each_other_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must agree in frame, action, state and tick rate.*'odd'"):
        collect(tmp_path, demonstration("a", np.ones((4, 2))), demonstration("odd", np.ones((4, 3))))
