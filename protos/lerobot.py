"""LeRobotDataset v3.0: where its files lie and what its columns are called, its own and those that we add.

A frame is an observation with every tick that was executed from it up to the next observation.  Shapes: M ticks, the
most that any frame has; K actions of A numbers in an answer, N = K*A tokens.  What is missing is 0: of the M ticks,
those past the frame's own; of an answer, where no policy was asked.

LeRobot's policies take every column whose name begins with `action` for something to answer, with `observation` for
something to read, and with an `_is_pad` inside for a mask: no column of ours is called like that.  All of them are
columns of frames, not of episodes, which LeRobot's own tools (merge, split, delete) do not keep.
"""

from __future__ import annotations

VERSION = "v3.0"

INFO = "meta/info.json"
STATS = "meta/stats.json"
TASKS = "meta/tasks.parquet"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
FILES_PER_CHUNK = 1000
TASK_NAMES = "__index_level_0__"
"""The column of TASKS that holds the instructions: a pandas index without a name."""

IMAGES = "observation.images."
"""Prefix of a camera's column."""
STATE = "observation.state"
ACTION = "action"
"""(A,): the first executed action of the frame, or the expert's in its place."""
REWARD = "next.reward"
"""1 in the frame that ended its episode in success, else 0."""
DONE = "next.done"
"""True in the last frame of an episode."""
TRUNCATED = "next.truncated"
"""True in the last frame of an episode that ran out of time."""
SUCCESS = "next.success"

DECISION = "decision"
TICK = "tick"
"""Ticks executed before the first that counts from the observation: those held since, for its answer, among them."""
CAPTURE_TIME_NS = "capture_time_ns"

EXECUTED_ACTIONS = "executed.actions"
"""(M*A,) what was really sent to the arm, tick by tick."""
EXECUTED_IS_PAD = "executed.is_pad"
"""(M,) True past the frame's own ticks."""
EXECUTED_SOURCE = "executed.source"
"""(M,) Source of episode.proto."""
EXECUTED_DECISION = "executed.decision"
"""(M,) whose answer it was: not the frame's own where that was asked for ahead."""
EXECUTED_INDEX = "executed.index"
"""(M,) which action of that answer."""
EXECUTED_REASONS = "executed.reasons"
"""Why the safety gate clipped or held, a line for each tick."""
EXPERT_ACTIONS = "expert.actions"
"""(M*A,) what an expert would have done, where one watched."""
EXPERT_WATCHED = "expert.watched"
"""(M,)"""

ANSWER_ACTIONS = "answer.actions"
"""(K*A,) as the policy answered, before the safety gate."""
ANSWER_TOKEN_IDS = "answer.token_ids"
"""(N,)"""
ANSWER_LOGPROBS = "answer.token_logprobs"
"""(N,)"""
ANSWER_VERSION = "answer.version"
"""-1 where no policy was asked."""
ANSWER_TEMPERATURE = "answer.temperature"

START = "episode.start"
"""EpisodeStart of episode.proto as JSON, the same in every frame of an episode."""
END = "episode.end"
"""EpisodeEnd as JSON, less the final observation."""


def place(number: int) -> dict[str, int]:
    """Where file `number` of a kind lies, for the patterns above."""
    chunk_index, file_index = divmod(number, FILES_PER_CHUNK)
    return {"chunk_index": chunk_index, "file_index": file_index}
