"""Sessions as what happened to them makes them: trials, verdicts, order, and what a restart finds."""

from __future__ import annotations

import errno
import json
import time
from collections import Counter
from pathlib import Path

import pytest

from policy_server.episode_store import EpisodeStore
from policy_server.errors import CannotStart, OutOfOrder, Overloaded, UnknownSession
from policy_server.gate import GateRule
from policy_server.session import Charter, moves, trial_of
from policy_server.session_service import described
from policy_server.sessions import Sessions
from protos import episode_pb2

SUCCESS, FAILURE, ERROR = episode_pb2.OUTCOME_SUCCESS, episode_pb2.OUTCOME_FAILURE, episode_pb2.OUTCOME_ERROR
LIVE, CANDIDATE = 0.9, 0.1
"""Draws by which an episode gets the one or the other."""
MOVED = Counter(moved=10)


def charter(name: str = "s", **fields) -> Charter:
    return Charter(
        **{
            "session_id": name,
            "task": "put the bowl on the plate",
            "base": 0,
            "temperature": 0.5,
            "noise_correlation": 0.0,
            "rule": GateRule(max_episodes=20),
            "started_unix_ns": 1,
            **fields,
        }
    )


class Lab:
    """Sessions in a folder, and robots that play episodes in them."""

    def __init__(self, folder: Path):
        self.folder, self.draw, self._names = folder, LIVE, 0
        self.store = EpisodeStore(folder / "episodes")
        self.open()

    def open(self) -> None:
        self.sessions = Sessions(self.folder / "sessions", self.store, draw=lambda: self.draw)

    def restart(self) -> None:
        self.store.close()
        self.store = EpisodeStore(self.folder / "episodes")
        self.open()

    def begin(self, draw: float = LIVE, *, session: str = "s"):
        """An episode that is open: its start, and its file."""
        self.draw, self._names = draw, self._names + 1
        _, version = self.sessions.choose(session)
        name = f"{self.folder.name}-{self._names}"
        start = episode_pb2.EpisodeStart(
            episode_id=name, session_id=session, version=version, started_unix_ns=time.time_ns()
        )
        writer = self.store.open(start)
        self.sessions.begin(start)
        return start, writer

    def stored(self, writer, outcome: int) -> None:
        self.store.finish(writer, episode_pb2.EpisodeEnd(outcome=outcome))

    def end(self, episode, outcome: int, moved: Counter[str] = MOVED) -> None:
        start, writer = episode
        self.stored(writer, outcome)
        self.sessions.end(start, outcome, moved)

    def play(self, draw: float, outcome: int, moved: Counter[str] = MOVED) -> None:
        self.end(self.begin(draw), outcome, moved)

    def message(self):
        with self.sessions.read("s") as session:
            return described(session, with_log=True)

    def counted(self):
        with self.sessions.read("s") as session:
            return [*session.episodes.values()]

    def whats(self) -> list[str]:
        return [event.what for event in self.message().log]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    lab = Lab(tmp_path)
    lab.sessions.start(charter())
    return lab


def offer(lab: Lab, version: int = 1) -> None:
    lab.sessions.offer("s", version, live=lab.message().live_version, accepted=True, reason="near enough")


def test_episodes_get_the_live_version_until_another_is_on_trial(lab):
    assert lab.begin(CANDIDATE)[0].version == 0
    offer(lab)
    assert [lab.begin(draw)[0].version for draw in (LIVE, CANDIDATE)] == [0, 1]


def test_a_candidate_that_does_better_is_promoted_and_its_evidence_is_in_the_log(lab):
    offer(lab)
    while lab.message().HasField("candidate_version"):
        lab.play(CANDIDATE, SUCCESS)
        if lab.message().HasField("candidate_version"):
            lab.play(LIVE, FAILURE)
    message = lab.message()
    assert (message.live_version, list(message.past_versions)) == (1, [0])
    assert lab.whats() == ["offer", "promote"] and message.log[-1].by == "gate"
    assert "does not succeed less often" in message.log[-1].reason


def test_one_that_does_worse_is_rolled_back(lab):
    offer(lab)
    while lab.message().HasField("candidate_version"):
        lab.play(CANDIDATE, FAILURE)
        lab.play(LIVE, SUCCESS)
    assert lab.whats() == ["offer", "roll back"] and lab.message().live_version == 0


def test_one_that_is_held_more_is_rolled_back_though_it_succeeds(lab):
    offer(lab)
    while lab.message().HasField("candidate_version"):
        lab.play(CANDIDATE, SUCCESS, Counter(moved=5, held=3, clipped=2))
        if lab.message().HasField("candidate_version"):
            lab.play(LIVE, SUCCESS)
    assert (
        lab.whats() == ["offer", "roll back"]
        and "held or clipped, or ends as an error, more" in lab.message().log[-1].reason
    )


def test_one_of_which_nothing_is_shown_is_undecided_at_the_rules_end(lab):
    offer(lab)
    for number in range(20):
        lab.play(CANDIDATE, SUCCESS if number % 2 else FAILURE)
        lab.play(LIVE, SUCCESS if number % 2 else FAILURE)
    assert lab.whats() == ["offer", "undecided"] and lab.message().live_version == 0


def test_an_episode_with_a_persons_help_is_no_success(lab):
    lab.play(LIVE, SUCCESS, Counter(moved=5, others=5))
    tally = lab.message().versions[0].tally
    assert (tally.episodes, tally.successes, tally.interventions, tally.ticks) == (1, 0, 1, 5)


def test_one_that_ended_as_an_error_is_neither_success_nor_failure_but_is_known(lab):
    lab.play(LIVE, ERROR)
    [version] = lab.message().versions
    assert (version.tally.episodes, version.tally.errors, version.tally.ticks) == (0, 1, 0)


def test_one_that_causes_errors_is_rolled_back(lab):
    offer(lab)
    while lab.message().HasField("candidate_version"):
        lab.play(CANDIDATE, ERROR)
        lab.play(LIVE, FAILURE)
    assert lab.whats() == ["offer", "roll back"] and "ends as an error, more" in lab.message().log[-1].reason


def test_episodes_count_in_the_order_in_which_they_began(lab):
    offer(lab)
    slow, quick = lab.begin(CANDIDATE), lab.begin(LIVE)
    lab.end(quick, SUCCESS)
    assert not lab.message().live.episodes
    lab.end(slow, FAILURE)
    assert (lab.message().live.episodes, lab.message().candidate.episodes) == (1, 1)


def test_one_that_is_lost_holds_up_nobody(lab):
    lost, after = lab.begin(), lab.begin()
    lab.end(after, SUCCESS)
    lab.sessions.leave_out(lost[0])
    assert lab.message().versions[0].tally.episodes == 1


def test_one_that_does_not_end_is_counted_as_an_error_and_waited_for_no_more(lab):
    endless, after = lab.begin(), lab.begin()
    lab.end(after, SUCCESS)
    lab.sessions.give_up(60.0)
    assert not lab.message().versions
    lab.sessions.give_up(0.0)
    [version] = lab.message().versions
    assert (version.tally.errors, version.tally.successes) == (1, 1)
    lab.end(endless, SUCCESS)
    lab.restart()
    assert lab.message().versions[0] == version, "it is counted once"


def test_an_episode_that_began_before_the_offer_is_not_of_the_trial(lab):
    early = lab.begin()
    offer(lab)
    lab.end(early, SUCCESS)
    assert not lab.message().live.episodes and lab.message().versions[0].tally.episodes == 1


def test_a_verdict_stands_and_what_was_open_then_counts_for_no_other_trial(lab):
    offer(lab)
    left = lab.begin(CANDIDATE)
    lab.sessions.control("s", "roll_back", "it looks wrong")
    offer(lab, 2)
    lab.end(left, SUCCESS)
    assert not lab.message().live.episodes and not lab.message().candidate.episodes


def test_a_restart_finds_what_was_acknowledged(lab):
    offer(lab)
    for outcome in (SUCCESS, FAILURE, SUCCESS):
        lab.play(CANDIDATE, outcome)
        lab.play(LIVE, FAILURE)
    before = lab.message()
    lab.restart()
    assert lab.message() == before and before.candidate.successes == 2


def test_a_stored_episode_that_was_not_counted_counts_once_after_a_restart(lab):
    offer(lab)
    _, writer = lab.begin(CANDIDATE)
    lab.stored(writer, SUCCESS)  # and here comes the kill
    for _ in range(2):
        lab.restart()
        assert [t.tally.successes for t in lab.message().versions] == [1] == [lab.message().candidate.episodes]


def test_a_verdict_that_a_kill_kept_back_is_given_after_the_restart(lab):
    offer(lab)
    log = lab.folder / "sessions" / "s.jsonl"
    while lab.message().HasField("candidate_version"):
        lab.play(CANDIDATE, FAILURE)
        lab.play(LIVE, SUCCESS)
    lines = log.read_bytes().splitlines(keepends=True)
    verdict = next(n for n, line in enumerate(lines) if b"roll back" in line)
    log.write_bytes(b"".join(lines[:verdict]))
    lab.restart()
    assert lab.whats() == ["offer", "roll back"]


def test_a_verdict_that_the_disk_refuses_stops_no_server_and_is_given_by_the_next(lab, monkeypatch):
    offer(lab)
    log = lab.folder / "sessions" / "s.jsonl"
    while lab.message().HasField("candidate_version"):
        lab.play(CANDIDATE, FAILURE)
        lab.play(LIVE, SUCCESS)
    log.write_bytes(log.read_bytes()[: log.read_bytes().index(b'{"what": "roll back"')])
    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *how, **more: FullDisk(opened(path, *how, **more)))
        lab.restart()
        assert lab.whats() == ["offer"]
    lab.restart()
    assert lab.whats() == ["offer", "roll back"]


@pytest.mark.parametrize("kept", [1, 20])
def test_a_line_that_a_kill_cut_is_dropped_and_the_log_goes_on(lab, kept):
    lab.play(LIVE, SUCCESS)
    log = lab.folder / "sessions" / "s.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[: whole[:-1].rfind(b"\n") + 1 + kept])
    lab.restart()  # the episode is stored, and counted again
    assert lab.message().versions[0].tally.episodes == 1
    lab.restart()
    assert lab.message().versions[0].tally.episodes == 1


@pytest.mark.parametrize("kept", [0, 30])
def test_a_start_that_a_kill_cut_short_is_none(lab, kept):
    log = lab.folder / "sessions" / "s.jsonl"
    log.write_bytes(log.read_bytes()[:kept])
    lab.restart()
    assert lab.sessions.ids == [] and not log.exists()
    lab.sessions.start(charter())
    lab.restart()
    assert lab.sessions.ids == ["s"]


class FullDisk:
    """Of the files that a session's log is: takes half of each write, and then no more."""

    def __init__(self, file):
        self._file, self._full = file, False

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, data) -> int:
        if self._full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._full = True
        return self._file.write(data[: len(data) // 2])


@pytest.fixture
def full_disk(lab, monkeypatch):
    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *how, **more: FullDisk(opened(path, *how, **more)))
        yield patch


def test_what_a_full_disk_cut_is_not_in_the_log(lab, full_disk):
    with pytest.raises(Overloaded, match="No space left"):
        offer(lab)
    with pytest.raises(Overloaded, match="No space left"):
        lab.sessions.start(charter("t"))
    assert lab.message() and not lab.whats() and lab.sessions.ids == ["s"]
    full_disk.undo()
    lab.sessions.start(charter("t"))
    offer(lab, 2)
    lab.restart()
    assert lab.whats() == ["offer"] and lab.message().candidate_version == 2
    assert sorted(lab.sessions.ids) == ["s", "t"]


def test_an_episode_that_a_full_disk_kept_from_the_log_is_counted_in_its_turn_once_there_is_room(lab, full_disk):
    lab.sessions.end(lab.begin()[0], SUCCESS, MOVED)
    assert not lab.message().versions
    full_disk.undo()
    lab.play(LIVE, FAILURE)
    assert [event.trial.success for event in lab.counted()] == [True, False]


def test_what_was_played_before_a_session_of_that_name_is_not_its_own(lab):
    start, writer = lab.begin()
    lab.stored(writer, SUCCESS)
    (lab.folder / "sessions" / "s.jsonl").unlink()
    lab.restart()
    lab.sessions.start(charter(started_unix_ns=start.started_unix_ns + 1))
    lab.restart()
    assert not lab.message().versions


def test_a_log_that_is_damaged_elsewhere_stops_the_server_and_is_named(lab):
    log = lab.folder / "sessions" / "s.jsonl"
    lab.play(LIVE, SUCCESS)
    whole = log.read_bytes()
    for damaged, line in (
        (b"{}\n" + whole, 1),
        (whole + b"what\n", 3),
        (whole + b"[]\n", 3),
        (whole.replace(b"trial", b"reason"), 2),
    ):
        log.write_bytes(damaged)
        with pytest.raises(CannotStart, match=rf"line {line} of the session log '{log}' is damaged"):
            lab.restart()


def test_people_promote_roll_back_and_go_back(lab):
    offer(lab)
    lab.sessions.control("s", "promote", "I saw it work")
    assert lab.message().live_version == 1
    lab.sessions.control("s", "roll_back", "")
    assert lab.message().live_version == 0
    with pytest.raises(OutOfOrder, match="nothing to go back to"):
        lab.sessions.control("s", "roll_back", "")
    with pytest.raises(OutOfOrder, match="nothing is on trial"):
        lab.sessions.control("s", "promote", "")
    assert lab.whats() == ["offer", "promote", "revert"]


def test_a_persons_word_befalls_the_version_that_is_meant_or_none(lab):
    offer(lab)
    for control in ("promote", "roll_back"):
        with pytest.raises(OutOfOrder, match="version 2 is meant, but version 1 is on trial now"):
            lab.sessions.control("s", control, "", version=2)
    lab.sessions.control("s", "promote", "", version=1)
    with pytest.raises(OutOfOrder, match="version 0 is meant, but version 1 is live now"):
        lab.sessions.control("s", "roll_back", "", version=0)
    lab.sessions.control("s", "roll_back", "", version=1)
    assert lab.whats() == ["offer", "promote", "revert"]


def test_a_paused_session_goes_on_with_its_live_version_and_tries_nothing(lab):
    offer(lab)
    lab.sessions.control("s", "pause", "")
    assert lab.begin(CANDIDATE)[0].version == 0
    with pytest.raises(OutOfOrder, match="paused"):
        lab.sessions.check_offer("s", 2)
    lab.sessions.control("s", "resume", "")
    offer(lab, 2)
    assert lab.whats() == ["offer", "withdrawn", "pause", "resume", "offer"]


def test_a_stopped_session_takes_no_more_episodes_and_stays_stopped(lab):
    lab.sessions.control("s", "stop", "")
    lab.restart()
    with pytest.raises(OutOfOrder, match="over"):
        lab.sessions.choose("s")
    with pytest.raises(OutOfOrder, match="stopped"):
        lab.sessions.control("s", "resume", "")


def test_a_stopped_session_keeps_its_live_version(lab):
    offer(lab)
    lab.sessions.control("s", "promote", "")
    lab.sessions.control("s", "stop", "")
    with pytest.raises(OutOfOrder, match="'s' is over"):
        lab.sessions.control("s", "roll_back", "")


def test_nothing_is_kept_for_the_trainer_of_a_stopped_session(lab):
    lab.play(LIVE, SUCCESS)
    lab.store.commit("s", 0)
    lab.store.commit("other", 0)
    lab.sessions.control("s", "stop", "")
    assert json.loads((lab.folder / "episodes" / "cursors.json").read_text()) == {"other": 0}


def test_one_candidate_is_on_trial_at_a_time_and_none_that_was_live(lab):
    offer(lab)
    assert lab.sessions.check_offer("s", 1) is None
    with pytest.raises(OutOfOrder, match="version 1 is on trial"):
        lab.sessions.check_offer("s", 2)
    lab.sessions.control("s", "roll_back", "")
    with pytest.raises(OutOfOrder, match="live"):
        lab.sessions.check_offer("s", 0)


def test_one_that_was_compared_with_a_version_that_is_live_no_more_is_not_on_trial(lab):
    offer(lab)
    lab.sessions.control("s", "promote", "")
    with pytest.raises(OutOfOrder, match="compared with version 0, but version 1 is live now"):
        lab.sessions.offer("s", 2, live=0, accepted=True, reason="")
    assert lab.whats() == ["offer", "promote"]


def test_a_version_has_one_trial(lab):
    offer(lab)
    while lab.message().HasField("candidate_version"):
        lab.play(CANDIDATE, FAILURE)
        lab.play(LIVE, SUCCESS)
    with pytest.raises(OutOfOrder, match="version 1 has had its trial"):
        lab.sessions.check_offer("s", 1)
    offer(lab, 2)
    lab.sessions.control("s", "pause", "lunch")
    lab.sessions.control("s", "resume", "")
    assert lab.sessions.check_offer("s", 2) == 0, "it had no verdict"


def test_of_a_session_that_is_over_its_base_and_its_last_version_are_kept(lab):
    for version in (1, 2, 3):
        offer(lab, version)
        lab.sessions.control("s", "promote", "")
    assert lab.sessions.versions() == {0, 1, 2, 3}
    lab.sessions.control("s", "stop", "")
    assert lab.sessions.versions() == {0, 3}


def test_a_session_starts_once(lab):
    lab.play(LIVE, SUCCESS)
    lab.sessions.start(charter(started_unix_ns=2))
    assert lab.message().versions[0].tally.episodes == 1
    with pytest.raises(OutOfOrder, match="another session"):
        lab.sessions.start(charter(base=3))
    with pytest.raises(UnknownSession, match="'t'"):
        lab.sessions.choose("t")


def test_sessions_do_not_touch_each_other(lab):
    lab.sessions.start(charter("t", started_unix_ns=2))
    offer(lab)
    assert lab.begin(CANDIDATE, session="t")[0].version == 0
    assert lab.sessions.served() == {0, 1}
    lab.sessions.control("s", "roll_back", "")
    assert lab.sessions.served() == {0}


def test_moves_tell_the_policys_from_others():
    ticks = [
        episode_pb2.Tick(source=episode_pb2.SOURCE_POLICY),
        episode_pb2.Tick(source=episode_pb2.SOURCE_BLEND),
        episode_pb2.Tick(source=episode_pb2.SOURCE_POLICY, reason="too fast"),
        episode_pb2.Tick(source=episode_pb2.SOURCE_HOLD, reason="late"),
        episode_pb2.Tick(source=episode_pb2.SOURCE_HUMAN),
        episode_pb2.Tick(source=episode_pb2.SOURCE_EXPERT),
    ]
    trial = trial_of(FAILURE, moves(ticks))
    assert (trial.ticks, trial.holds, trial.clips, trial.intervened) == (4, 1, 1, True)
    assert not trial.error and trial_of(ERROR, moves(ticks)).error
