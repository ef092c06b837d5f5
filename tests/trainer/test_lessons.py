from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from policy_server.vla.action_tokens import ActionTokens
from policy_server.vla.checkpoint import load_config
from policy_server.vla.config import VLAConfig
from policy_server.vla.preprocessing import Prepared
from policy_server.vla.tokenizer import Tokenizer
from protos import episode_pb2
from protos.episode_file import Episode
from rl_trainer.lessons import Lesson, LessonKind, Lessons, interventions, seen_at, successes
from rl_trainer.trajectories import RefusedEpisode, TrajectoryReader
from robot_client.arm import ArmSpec, Observation
from robot_client.client import PolicyClient
from robot_client.drivers import run
from robot_client.episode import EpisodeConfig
from robot_client.pilot import Wish
from tests.client.conftest import rollout_of
from tests.client.fake_arm import FakeArm, spec_of
from tests.client.scripted_policy import Running, ScriptedPolicy
from tests.trainer import fake_episodes as fake
from tests.trainer.fake_episodes import ticks

A, K = 7, 4


@pytest.fixture
def config(tiny_vla: Path) -> VLAConfig:
    return replace(load_config(tiny_vla), chunk_length=K)


@pytest.fixture
def reader(tiny_vla: Path, config: VLAConfig) -> TrajectoryReader:
    return TrajectoryReader(config, Tokenizer.load(tiny_vla))


@pytest.fixture
def write(tmp_path: Path, config: VLAConfig):
    """An episode of these ticks, three decisions; the n-th moves n / 20 along x, where it has no action of its own."""

    def write(*runs: list[episode_pb2.Tick], **options) -> Episode:
        executed = [tick for run in runs for tick in run]
        for place, tick in enumerate(executed):
            if tick.action[:] == ticks(0, "p")[0].action[:]:
                tick.action[:] = action(place)
        chunks = [fake.numbered_chunk(config, number) for number in range(3)]
        return fake.write_episode(tmp_path, config, executed, chunks, **options)

    return write


def action(place: int) -> list[float]:
    return [place / 20, 0, 0, 0, 0, 0, 1]


def waiting(decision: int, sources: str, *, first: int) -> list[episode_pb2.Tick]:
    """Ticks without motion; the gripper stays open."""
    still = ticks(decision, sources, first=first)
    for tick in still:
        tick.action[:] = [0, 0, 0, 0, 0, 0, 1]
    return still


def seen(lesson: Lesson) -> int:
    """The decision, by the grey of what it saw."""
    return int(lesson.observation.image[0, 0, 0]) // 10


def scored(lesson: Lesson) -> list[bool]:
    """Of each action of the chunk; a part of one is scored nowhere."""
    mask_KA = lesson.mask_N.reshape(K, A)
    assert (mask_KA == mask_KA[:, :1]).all()
    return mask_KA[:, 0].tolist()


def labels(config: VLAConfig, places: Sequence[int]) -> list[int]:
    """The tokens of what was executed at those ticks."""
    return ActionTokens(config).encode(np.array([action(place) for place in places])).tolist()


def test_a_success_teaches_the_tokens_that_were_sampled_under_the_mask_that_was_executed(write, reader, config) -> None:
    first, second = successes(reader.read(write(ticks(0, "pppp"), ticks(1, "pp"))))
    assert (first.kind, second.kind, seen(first), seen(second)) == ("success", "success", 0, 1)
    assert second.token_ids_N.tolist() == [config.action_begin + place + 1 for place in range(K * A)]
    assert scored(first) == [True] * 4 and scored(second) == [True, True, False, False]
    assert first.temperature == 1.5


def test_a_hold_is_no_help(write, reader) -> None:
    """In real time an arm that asks when its chunk is exhausted holds before every answer."""
    episode = write(ticks(0, "pppp"), ticks(0, "hh", first=4), ticks(1, "pppp"), ticks(1, "h", first=4), ticks(2, "p"))
    assert [seen(lesson) for lesson in successes(reader.read(episode))] == [0, 1, 2]


@pytest.mark.parametrize("somebody", ["u", "x", "b"])
def test_an_episode_that_was_helped_is_no_success_of_the_policys(write, reader, somebody: str) -> None:
    helped = write(ticks(0, "pppp"), ticks(1, somebody * 4), ticks(2, "pppp"))
    assert len(reader.read(helped)) == 2 and not successes(reader.read(helped))


def test_a_failure_teaches_nothing(write, reader) -> None:
    assert not successes(reader.read(write(ticks(0, "pppp"), outcome=episode_pb2.OUTCOME_FAILURE)))
    assert not interventions(write(ticks(0, "pppp"), ticks(1, "uuuu"), outcome=episode_pb2.OUTCOME_FAILURE), reader)


@pytest.mark.parametrize("purpose", [episode_pb2.PURPOSE_EVALUATE, episode_pb2.PURPOSE_DEPLOY])
def test_episodes_that_are_not_for_training_never_enter(write, reader, purpose) -> None:
    with pytest.raises(RefusedEpisode):
        reader.read(write(ticks(0, "pppp"), purpose=purpose))
    assert not interventions(write(ticks(0, "ppuu"), purpose=purpose), reader)


@pytest.mark.parametrize("somebody", ["u", "x"])
def test_a_takeover_teaches_what_was_executed_and_only_the_helpers_ticks_of_it(
    write, reader, config, somebody: str
) -> None:
    """Of a chunk of four, two actions of the policy's and two of the person's, who drives on for longer."""
    [lesson] = interventions(write(ticks(0, "pp"), ticks(0, somebody * 6, first=2)), reader)
    assert (lesson.kind, seen(lesson), lesson.temperature) == ("intervention", 0, 1.0)
    assert lesson.token_ids_N.tolist() == labels(config, [0, 1, 2, 3])
    assert scored(lesson) == [False, False, True, True]


def test_what_the_policy_did_after_it_was_let_go_is_read_and_not_scored(write, reader, config) -> None:
    first, second = interventions(
        write(ticks(0, "p"), ticks(0, "u", first=1), ticks(1, "p"), ticks(1, "u", first=1), ticks(2, "pppp")), reader
    )
    assert [seen(first), seen(second)] == [0, 1]
    assert first.token_ids_N.tolist() == labels(config, [0, 1, 2, 3])
    assert scored(first) == [False, True, False, True]
    assert second.token_ids_N.tolist() == labels(config, [2, 3, 4, 5])
    assert scored(second) == [False, True, False, False]


def test_a_decision_that_nobody_helped_out_within_a_chunk_of_is_no_lesson(write, reader) -> None:
    lessons = interventions(write(ticks(0, "pppp"), ticks(1, "ppp"), ticks(1, "u", first=3), ticks(2, "pppp")), reader)
    assert [seen(lesson) for lesson in lessons] == [1]
    assert not interventions(write(ticks(0, "pppp"), ticks(1, "pp")), reader)


def test_nothing_past_the_end_is_scored(write, reader, config) -> None:
    [lesson] = interventions(write(ticks(0, "p"), ticks(0, "u", first=1)), reader)
    assert lesson.token_ids_N[: 2 * A].tolist() == labels(config, [0, 1])
    assert scored(lesson) == [False, True, False, False]


def test_a_decision_that_was_answered_during_a_takeover_is_labelled_from_its_observation_on(
    write, reader, config
) -> None:
    """Asked ahead before tick 3 and answered before tick 5; nothing of it was followed."""
    lessons = interventions(write(ticks(0, "pppp"), ticks(0, "u", first=4), ticks(1, "uuu", first=2)), reader)
    assert [seen(lesson) for lesson in lessons] == [1]
    assert lessons[0].token_ids_N.tolist() == labels(config, [3, 4, 5, 6])
    assert scored(lessons[0]) == [False, True, True, True]


def test_observations_of_a_takeover_are_lessons_where_there_are_any(write, reader, config) -> None:
    """A robot that goes on asking while a person drives."""
    lessons = interventions(write(ticks(0, "pp"), ticks(0, "uu", first=2), ticks(1, "uuuu"), ticks(2, "uu")), reader)
    assert [seen(lesson) for lesson in lessons] == [0, 1, 2]
    assert lessons[1].token_ids_N.tolist() == labels(config, [4, 5, 6, 7])
    assert [sum(scored(lesson)) for lesson in lessons] == [2, 4, 2]


def test_ticks_at_which_nothing_moved_are_left_out(write, reader, config) -> None:
    """The person's hand is on the device for three ticks before it drives, and the arm held once."""
    episode = write(ticks(0, "p"), waiting(0, "uuu", first=1), ticks(0, "uhuu", first=4))
    [lesson] = interventions(episode, reader)
    assert lesson.token_ids_N.tolist() == labels(config, [0, 4, 6, 7])
    assert scored(lesson) == [False, True, True, True]


def test_a_person_who_only_waited_teaches_nothing(write, reader) -> None:
    assert not interventions(write(waiting(0, "uuuu", first=0)), reader)
    assert not interventions(write(ticks(0, "pp"), waiting(0, "uuuu", first=2), ticks(1, "pp")), reader)


def test_a_gripper_that_a_person_closes_is_a_motion(write, reader) -> None:
    close = waiting(0, "uu", first=1)
    for tick in close:
        tick.action[6] = 0
    [lesson] = interventions(write(ticks(0, "p"), close, ticks(1, "ppp")), reader)
    assert scored(lesson) == [False, True, False, False], "the second tick repeats the command"


def test_an_experts_waiting_is_its_choice(write, reader) -> None:
    [lesson] = interventions(write(ticks(0, "p"), waiting(0, "xxx", first=1)), reader)
    assert scored(lesson) == [False, True, True, True]


def test_an_expert_that_drove_is_taught_without_its_noise_and_one_that_watched_is_not(write, reader, config) -> None:
    watched, driven = ticks(0, "pp"), ticks(0, "xx", first=2)
    for tick in (*watched, *driven):
        tick.expert_action[:] = action(9)
    [lesson] = interventions(write(watched, driven), reader)
    assert lesson.token_ids_N.tolist() == labels(config, [0, 1, 9, 9])
    assert scored(lesson) == [False, False, True, True]


def test_where_the_first_observation_was_taken_is_told_by_what_followed_its_answer() -> None:
    """Before it, indices count from the episode's beginning, whenever it was asked for."""
    assert seen_at([*ticks(0, "uuu"), *ticks(0, "pp")], 0) == 3
    assert seen_at([*ticks(0, "uuuu"), *ticks(0, "uu", first=1)], 0) == 3
    assert seen_at(ticks(0, "uuuu"), 0) is None


def test_holds_are_no_part_of_the_policys_indices_and_a_part_of_others() -> None:
    """Decision 1 is asked for before tick 2; the arm holds until its answer comes."""
    before = [*ticks(0, "pp"), *ticks(0, "p", first=2), *ticks(0, "hh", first=3)]
    assert seen_at([*before, *ticks(1, "pp", first=1)], 1) == 2
    assert seen_at([*before, *ticks(1, "uu", first=3)], 1) == 2
    assert seen_at(before, 1) is None


@pytest.mark.parametrize(("lockstep", "ahead", "late"), [(True, 0, 0), (True, 2, 2), (False, 0, 1), (False, 2, 3)])
def test_where_observations_were_taken_is_told_of_what_a_robot_records(lockstep: bool, ahead: int, late: int) -> None:
    """A person drives first, and twice later on."""
    arm, driven = Watched(spec_of(lockstep=lockstep)), {0, 1, 2, 9, 10, 11, 12, 13, 17, 18}
    running = Running(ScriptedPolicy())
    running.policy.delay_s = 0 if lockstep else late / arm.spec.tick_rate_hz
    how = EpisodeConfig(ahead_ticks=ahead, latency_ticks=late if lockstep else 0)
    with PolicyClient(running.address) as client:
        [_] = run(arm, [rollout_of(max_ticks=24)], client, how, pilot=Helper(arm, driven))
    running.stop()
    recorded = running.policy.only_episode
    taken = {number: arm.ticks[answer.capture_time_ns] for number, answer in recorded.answers.items()}
    told = {number: place for number in taken if (place := seen_at(recorded.ticks, number)) is not None}
    assert len(told) >= 3 and driven & {*told.values()}
    for number, place in told.items():  # what lies between are holds
        between = recorded.ticks[min(place, taken[number]) : max(place, taken[number])]
        assert {tick.source for tick in between} <= {episode_pb2.SOURCE_HOLD}


class Watched(FakeArm):
    """Remembers the tick before which each of its observations was taken."""

    def __init__(self, spec: ArmSpec):
        super().__init__(spec)
        self.ticks = dict[int, int]()

    def observe(self) -> Observation:
        observation = super().observe()
        self.ticks[observation.capture_time_ns] = self.state().tick
        return observation


class Helper:
    """Drives at these ticks."""

    def __init__(self, arm: FakeArm, driven: set[int]):
        self._arm, self._driven = arm, driven

    def wish(self) -> Wish:
        return Wish(action_A=np.array(action(10), np.float32) if self._arm.state().tick in self._driven else None)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"unnorm_key": "other"}, "other_model"),
        ({"image_path": "libero"}, "other_model"),
        ({"index": 9}, "damaged: executed: index must be below 3, got 9"),
        ({"action": [0.1] * 6}, r"damaged: executed: actions must have 7 numbers, got \[6\]"),
    ],
)
def test_a_strangers_or_a_damaged_takeover_is_refused(write, reader, changed: dict, reason: str) -> None:
    how = {"index": 2, "action": action(2)}
    taken = {name: changed.pop(name, value) for name, value in how.items()}
    tick = episode_pb2.Tick(decision=1, source=episode_pb2.SOURCE_HUMAN, **taken)
    with pytest.raises(RefusedEpisode, match=reason):
        interventions(write(ticks(0, "pp"), [tick], **changed), reader)


def lesson(kind: LessonKind, number: int) -> Lesson:
    seen = Prepared(image=np.zeros((1, 1, 3), np.uint8), input_ids=np.array([1]), state=None)
    return Lesson(kind=kind, observation=seen, token_ids_N=np.array([number]), mask_N=np.ones(1, bool), temperature=1.0)


def numbers(lessons: Lessons, kind: LessonKind) -> list[int]:
    return [int(lesson.token_ids_N[0]) for lesson in lessons if lesson.kind == kind]


def test_the_oldest_lessons_of_a_kind_leave_first_and_the_other_kind_stays() -> None:
    lessons = Lessons(capacity=3)
    lessons.add([lesson("intervention", 0)])
    for episode in ((0, 1), (2, 3), (4,)):
        lessons.add([lesson("success", number) for number in episode])
    assert numbers(lessons, "success") == [2, 3, 4] and numbers(lessons, "intervention") == [0]
    assert len(lessons) == len([*lessons]) == 4


def test_episodes_that_are_read_again_in_their_order_give_the_same_lessons() -> None:
    first, again = Lessons(capacity=5), Lessons(capacity=5)
    parts = [[lesson(kind, number) for kind in ("success", "intervention")] for number in range(9)]
    for part in parts:
        first.add(part)
    again.add([one for part in parts for one in part])
    assert [*first] == [*again]


def test_a_buffer_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity must be >= 1, got 0"):
        Lessons(capacity=0)
