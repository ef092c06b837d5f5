from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from policy_server.vla.checkpoint import load_config
from policy_server.vla.config import VLAConfig
from policy_server.vla.tokenizer import Tokenizer
from protos import episode_pb2
from rl_trainer.trajectories import RefusedEpisode, Trajectory, TrajectoryReader
from tests.trainer import fake_episodes as fake
from tests.trainer.fake_episodes import ticks

A, K = 7, 4


@pytest.fixture
def config(tiny_vla: Path) -> VLAConfig:
    return replace(load_config(tiny_vla), chunk_length=K)


@pytest.fixture
def read(tmp_path: Path, tiny_vla: Path, config: VLAConfig):
    """Trajectories of an episode with these ticks, three decisions unless chunks are given."""
    tokenizer = Tokenizer.load(tiny_vla)

    def read(
        *runs: list[episode_pb2.Tick],
        chunks: list[episode_pb2.Chunk] | None = None,
        limit_ends: bool = False,
        **options,
    ):
        reader = TrajectoryReader(config, tokenizer, limit_ends=limit_ends)
        executed = [tick for run in runs for tick in run]
        chunks = chunks or [fake.numbered_chunk(config, number) for number in range(3)]
        return reader.read(fake.write_episode(tmp_path, config, executed, chunks, **options))

    return read


def numbers(trajectory: Trajectory) -> list[int]:
    """The decisions in it, by the grey of what they saw."""
    return [int(observation.image[0, 0, 0]) // 10 for observation in trajectory.observations]


def bootstrap(trajectory: Trajectory) -> int | None:
    """The grey of the observation to bootstrap from."""
    return None if trajectory.after is None else int(trajectory.after.image[0, 0, 0])


def test_the_executed_prefix_of_a_decision_is_scored_and_its_ticks_are_counted(read) -> None:
    [trajectory] = read(ticks(0, "pppp"), ticks(1, "pp"), ticks(2, "p"))
    assert trajectory.ticks_T.tolist() == [4, 2, 1]
    assert trajectory.mask_TN.tolist() == [[place < count * A for place in range(K * A)] for count in (4, 2, 1)]
    assert len(trajectory) == 3 and numbers(trajectory) == [0, 1, 2]
    assert (trajectory.task, trajectory.initial_state, trajectory.success) == ("libero_object/3", "17", True)


def test_a_decision_of_which_nothing_was_executed_is_left_out(read) -> None:
    [trajectory] = read(ticks(0, "pppp"), ticks(2, "pp"))
    assert numbers(trajectory) == [0, 2]
    assert trajectory.token_ids_TN[:, 0].tolist() == [512, 514]
    assert trajectory.after is None


def test_tokens_of_skipped_actions_are_scored_but_not_counted_as_time(read) -> None:
    """The executed tokens of a chunk entered at index 2 were sampled given the first two actions."""
    [trajectory] = read(ticks(0, "pppp"), ticks(1, "p", first=2), ticks(2, "ppp", first=1))
    assert trajectory.ticks_T.tolist() == [4, 1, 3]
    assert trajectory.mask_TN.sum(1).tolist() == [4 * A, 3 * A, 4 * A]
    assert trajectory.mask_TN[1, : 3 * A].all()


def test_every_decision_has_its_own_version_and_recorded_logprobs(read, config: VLAConfig) -> None:
    """Defects 3 and 7: nothing is recomputed, and an episode that follows the live version names each one's weights."""
    chunks = [
        fake.numbered_chunk(config, 0, temperature=1.5, version=3),
        fake.numbered_chunk(config, 1, temperature=0.5, version=4),
    ]
    [trajectory] = read(ticks(0, "pppp"), ticks(1, "pp"), chunks=chunks, version=3, follow_live=True)
    assert trajectory.version_T.tolist() == [3, 4]
    assert trajectory.temperature_T.tolist() == [1.5, 0.5]
    np.testing.assert_array_equal(trajectory.logprobs_TN[1], (-2 - np.arange(K * A) / 100).astype(np.float32))
    assert trajectory.token_ids_TN[1].tolist() == list(range(513, 513 + K * A))


def test_images_stay_uint8(read, config: VLAConfig) -> None:
    """Defect 11."""
    [trajectory] = read(ticks(0, "pppp"), terminal=False)
    side = config.image_size
    for observation in (*trajectory.observations, trajectory.after):
        assert observation.image.dtype == np.uint8 and observation.image.nbytes == 3 * side * side
    assert trajectory.observations[0].state.shape == (8,) and trajectory.observations[0].input_ids.ndim == 1


def test_success_is_paid_to_the_last_decision_and_nothing_follows_it(read) -> None:
    [trajectory] = read(ticks(0, "pppp"), ticks(1, "pp"))
    assert trajectory.rewards_T.tolist() == [0, 1]
    assert trajectory.after is None and bootstrap(trajectory) is None


@pytest.mark.parametrize("terminal", [True, False])
def test_out_of_time_is_no_termination(read, terminal: bool) -> None:
    """Defect 6: when time ran out the final observation is there to bootstrap from; when the task failed it is not."""
    [trajectory] = read(ticks(0, "pppp"), outcome=episode_pb2.OUTCOME_FAILURE, terminal=terminal)
    assert trajectory.rewards_T.tolist() == [0]
    assert (trajectory.after is None) is terminal
    assert bootstrap(trajectory) == (None if terminal else fake.FINAL)


def test_where_success_in_time_is_asked_for_nothing_comes_after_it(read) -> None:
    [trajectory] = read(ticks(0, "pppp"), outcome=episode_pb2.OUTCOME_FAILURE, terminal=False, limit_ends=True)
    assert trajectory.after is None and bootstrap(trajectory) is None and not trajectory.rewards_T.any()


def test_a_takeover_cuts_and_the_success_of_a_human_is_not_the_policys(read) -> None:
    [trajectory] = read(ticks(0, "pppp"), ticks(1, "uuuu"))
    assert numbers(trajectory) == [0] and trajectory.rewards_T.tolist() == [0]
    assert bootstrap(trajectory) == 10, "the observation before the human moved, neither the final one nor none"
    assert trajectory.success and not trajectory.whole


@pytest.mark.parametrize("somebody", ["u", "b", "x"])
@pytest.mark.parametrize("pattern", ["pp{}{}", "{}{}pp", "p{}"])
def test_a_decision_that_somebody_else_interfered_with_is_refused(read, somebody: str, pattern: str) -> None:
    """Its own end was never seen: what comes next is a trajectory of its own, and starts where the others left off."""
    before, after = read(ticks(0, "pppp"), ticks(1, pattern.format(somebody, somebody)), ticks(2, "pp"))
    assert numbers(before) == [0] and numbers(after) == [2]
    assert bootstrap(before) == 10 and before.rewards_T.tolist() == [0]
    assert after.after is None and after.rewards_T.tolist() == [1]
    assert not before.whole and not after.whole


def test_a_hold_cuts_and_both_sides_are_learned_from(read) -> None:
    before, after = read(ticks(0, "pppp"), ticks(0, "hh", first=4), ticks(1, "pppp"), ticks(2, "p"))
    assert numbers(before) == [0] and numbers(after) == [1, 2]
    assert bootstrap(before) == 10 and before.after is not None
    assert before.ticks_T.tolist() == [4] and after.ticks_T.tolist() == [4, 1]
    assert after.rewards_T.tolist() == [0, 1]
    assert not before.whole and not after.whole


def test_an_episode_that_ends_while_the_arm_holds_ends_as_it_stands(read) -> None:
    [trajectory] = read(ticks(0, "pppp"), ticks(1, "pppp"), ticks(1, "hh", first=4))
    assert trajectory.after is None and trajectory.rewards_T.tolist() == [0, 1]


def test_a_hold_before_the_first_answer_changes_nothing(read) -> None:
    [trajectory] = read(ticks(0, "hh"), ticks(0, "pppp"), ticks(1, "pp"))
    assert numbers(trajectory) == [0, 1] and trajectory.whole


def test_what_remains_when_a_human_drove_first_is_not_the_whole_episode(read) -> None:
    """Its return may be a success that the human prepared: nothing to compare with other episodes."""
    [trajectory] = read(ticks(0, "uu"), ticks(1, "pppp"))
    assert numbers(trajectory) == [1] and trajectory.rewards_T.tolist() == [1] and not trajectory.whole


def test_a_clip_by_the_safety_gate_changes_nothing(read) -> None:
    [free] = read(ticks(0, "pppp"))
    [clipped] = read(ticks(0, "pppp", reason="step limit"))
    for name in ("token_ids_TN", "logprobs_TN", "mask_TN", "ticks_T", "rewards_T"):
        np.testing.assert_array_equal(getattr(free, name), getattr(clipped, name))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"purpose": episode_pb2.PURPOSE_EVALUATE}, "purpose_evaluate"),
        ({"purpose": episode_pb2.PURPOSE_DEPLOY}, "purpose_deploy"),
        ({"purpose": episode_pb2.PURPOSE_DEMONSTRATE}, "purpose_demonstrate"),
        ({"outcome": episode_pb2.OUTCOME_ERROR}, "outcome_error"),
        ({"outcome": episode_pb2.OUTCOME_UNSPECIFIED}, "outcome_unspecified"),
        ({"unnorm_key": "other"}, "other_model"),
        ({"image_path": "libero"}, "other_model"),
    ],
)
def test_an_evaluation_episode_an_error_and_a_strangers_episode_cannot_enter(read, fields: dict, reason: str) -> None:
    with pytest.raises(RefusedEpisode) as refused:
        read(ticks(0, "pppp"), **fields)
    assert refused.value.reason == reason


def test_greedy_answers_are_no_samples(read, config: VLAConfig) -> None:
    with pytest.raises(RefusedEpisode, match="greedy"):
        read(ticks(0, "pppp"), chunks=[fake.numbered_chunk(config, 0, temperature=0.0)])


@pytest.mark.parametrize("executed", [[], ticks(0, "hh"), ticks(0, "uuuu"), ticks(0, "ppuu")])
def test_an_episode_in_which_the_policy_finished_nothing_is_refused(read, executed: list) -> None:
    with pytest.raises(RefusedEpisode, match="nothing_to_score"):
        read(executed)


@pytest.mark.parametrize(
    ("executed", "complaint"),
    [
        (ticks(0, "pppp") + ticks(0, "p", first=4), "index must be below 4, got 4"),
        (ticks(0, "p") + ticks(0, "p", first=2), r"without gaps, got indices \[0, 2\]"),
        (ticks(0, "pp") + ticks(0, "h") + ticks(0, "pp", first=2), "decision 0 must be later than 0"),
        (ticks(0, "p") + ticks(7, "p"), r"decisions \[7\] are not recorded"),
    ],
)
def test_ticks_that_no_arm_can_have_executed_are_damage(read, executed: list, complaint: str) -> None:
    with pytest.raises(RefusedEpisode, match=f"damaged.*{complaint}"):
        read(executed)


def test_tokens_and_logprobs_are_checked_at_the_door(read, config: VLAConfig) -> None:
    """Defect 5: exactly N tokens, all of them action tokens."""
    ids, logprobs = config.action_begin + np.arange(K * A), np.full(K * A, -1.0)
    below, above, unknown = ids - 1, ids.copy(), logprobs.copy()
    above[3], unknown[3] = config.vocabulary, np.nan
    for wrong, complaint in [
        (fake.chunk(config, below, logprobs), r"must be in \[512, 767\], got \[511"),
        (fake.chunk(config, above, logprobs), r"must be in \[512, 767\], got \[512, 768\]"),
        (fake.chunk(config, ids[:-1], logprobs), r"shape must be \(28,\), got \(27,\)"),
        (fake.chunk(config, ids, logprobs[:-1]), r"shape must be \(28,\), got \(27,\)"),
        (fake.chunk(config, ids, unknown), "must be finite"),
    ]:
        with pytest.raises(RefusedEpisode, match=f"damaged.*{complaint}"):
            read(ticks(0, "pppp"), chunks=[wrong])


def test_a_truncated_episode_without_a_final_observation_cannot_be_bootstrapped(read) -> None:
    with pytest.raises(RefusedEpisode, match="final_observation: images must include 'agentview'"):
        read(ticks(0, "pppp"), terminal=False, final=False)
