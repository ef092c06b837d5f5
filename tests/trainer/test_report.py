"""The report needs the run's folder alone, and its page nothing else at all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from policy_server.vla.checkpoint import load_config
from policy_server.vla.config import VLAConfig
from protos import episode_pb2
from protos.animation import CAPTION_PX
from rl_trainer.films import HOLD, film_evaluation, read_webp, write_webp
from rl_trainer.report import SMOOTH, Reporter, smoothed, write_report
from rl_trainer.tally import Tally
from tests.trainer import fake_episodes as fake
from tests.trainer.fake_curve import evaluation, finished, iteration

TASKS = {"suite/0": "lift the <cube>", "suite/1": "stack the cubes"}
ROWS = [
    evaluation(0, {"suite/0": "sf", "suite/1": "ff"}),
    iteration(1, {"suite/0": "sff", "suite/1": "f"}),
    iteration(2, {"suite/0": "ss", "suite/1": "sf"}),
    evaluation(2, {"suite/0": "ss", "suite/1": "sf"}),
    iteration(3, {"suite/0": "ss", "suite/1": "ss"}),
]


class Page(HTMLParser):
    """What a page shows in its tables, and what it asks of the world."""

    def __init__(self, path: Path):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self._cell = False
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self._cell = tag in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._cell = False


def run(out: Path, rows: Sequence[dict] = ROWS) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    (out / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    write_webp(_report(tmp_path) / "suite-0.webp", [np.zeros((8, 8, 3), np.uint8)])
    page = Page(write_report(run(tmp_path), TASKS))
    assert page.tags >= {"svg", "img"} and not page.tags & {"script", "link", "iframe"}
    assert page.sources and all(source.startswith(("#", "data:")) for source in page.sources)


def test_the_tables_say_what_the_curve_says(tmp_path: Path) -> None:
    spent, tasks = Page(write_report(run(tmp_path), TASKS)).tables
    assert spent[0][:6] == ["iteration", "environment steps", "decisions", "episodes", "optimiser steps", "wall clock"]
    assert spent[2] == ["2", "800", "80", "8", "14", "0:04 h", "3/4", "75.0", "[37.5, 87.5]", "0"]
    assert [line[0] for line in spent[1:]] == ["0", "2", "3"]
    assert tasks[1:] == [
        ["suite/0", "5/7", "5/7", "1/2", "2/2", "lift the <cube>"],
        ["suite/1", "3/5", "3/5", "0/2", "1/2", "stack the cubes"],
        ["all", "8/12", "8/12", "1/4", "3/4", ""],
    ]


def test_a_curve_from_before_tasks_were_counted_is_drawn_too(tmp_path: Path) -> None:
    old = [{name: value for name, value in row.items() if "suite/" not in name} for row in ROWS]
    (spent,) = Page(write_report(run(tmp_path, old))).tables
    assert [line[0] for line in spent[1:]] == ["0", "2", "3"]
    assert smoothed(old) == smoothed(ROWS)


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS[1:2]])
def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path, rows: list[dict]) -> None:
    assert write_report(run(tmp_path, rows)).read_text().endswith("</html>\n")


def test_training_success_is_taken_over_the_last_iterations() -> None:
    rows = [iteration(step, {"a/0": "ssff" if step == 1 else "sfff"}) for step in range(1, SMOOTH + 3)]
    steps, tallies = smoothed(rows)
    assert steps[:2] == [400, 800] and tallies[0] == Tally(2, 4) and tallies[1] == Tally(3, 8)
    assert tallies[SMOOTH - 1] == Tally(SMOOTH + 1, 4 * SMOOTH) and tallies[-1] == Tally(SMOOTH, 4 * SMOOTH)


def test_a_film_has_the_first_evaluation_beside_the_newest(tiny_vla: Path, tmp_path: Path) -> None:
    config = load_config(tiny_vla)
    for number, (step, chunks) in enumerate([(0, 2), (10, 5), (20, 3)]):
        _evaluate(config, tmp_path, step, chunks)
        before = read_webp(tmp_path / "before" / "suite-0.webp")
        both = read_webp(tmp_path / "suite-0.webp")
        assert len(before) == 3  # two decisions and the end
        assert len(both) == max(3, chunks + 1) + HOLD
        height, width, _ = before[0].shape
        assert both[0].shape == (height + CAPTION_PX, width if number == 0 else 2 * width, 3)
        # The episode's last frame, grey 200, is where both stand still.
        assert abs(int(both[-1][10, width // 2, 0]) - fake.FINAL) < 12


def test_a_rollout_that_ended_as_an_error_leaves_its_film_alone(tiny_vla: Path, tmp_path: Path) -> None:
    film = tmp_path / "suite-0.webp"
    film_evaluation(tmp_path, 0, [finished("suite/0", "e")], camera="agentview")
    assert not film.exists()
    _evaluate(load_config(tiny_vla), tmp_path, 10, 2)
    there = film.read_bytes()
    film_evaluation(tmp_path, 20, [finished("suite/0", "e"), finished("suite/0", "s")], camera="agentview")
    assert film.read_bytes() == there


def test_a_film_that_a_kill_cut_short_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film, frames = tmp_path / "a.webp", [np.zeros((16, 16, 3), np.uint8)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        write_webp(film, frames)
    assert not film.exists()
    write_webp(film, frames)
    assert len(read_webp(film)) == 1


def test_equal_frames_are_read_as_often_as_they_were_written(tmp_path: Path) -> None:
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    write_webp(tmp_path / "a.webp", [black, black, white, white, white, black])
    assert [round(frame.mean() / 255) for frame in read_webp(tmp_path / "a.webp")] == [0, 0, 1, 1, 1, 0]


def test_the_reporter_writes_at_every_save_what_the_curve_has_by_then(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, camera="agentview")
    reporter.on_start(TASKS, [], 0.0)
    for stop in (2, 5):
        run(tmp_path, ROWS[:stop])
        reporter.on_save()
        assert Page(tmp_path / "report" / "index.html").tables[0][-1][0] == f"{ROWS[stop - 1]['step']}"


def _report(out: Path) -> Path:
    (out / "report").mkdir(parents=True)
    return out / "report"


def _evaluate(config: VLAConfig, folder: Path, step: int, chunks: int) -> None:
    """An evaluation of one task, with an episode of so many decisions."""
    episode = fake.write_episode(
        folder,
        config,
        [tick for decision in range(chunks) for tick in fake.ticks(decision, "pp")],
        [fake.numbered_chunk(config, decision) for decision in range(chunks)],
        purpose=episode_pb2.PURPOSE_EVALUATE,
    )
    film_evaluation(folder, step, [finished("suite/0", "s", episode)], camera=config.camera)
