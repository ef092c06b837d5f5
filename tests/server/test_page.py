"""The live page in a browser.

With SCREENSHOTS=docs/page it also takes the pictures of the README, of robots in LIBERO where that is installed:

    SCREENSHOTS=docs/page .venv/bin/python -m pytest tests/server/test_page.py -k working_lab
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from policy_server.version_store import VersionStore
from protos import admin_pb2, admin_pb2_grpc, episode_pb2
from protos.channel import free_port
from robot_client.arm import Task
from robot_client.arms.kinematic import KinematicArm
from robot_client.client import PolicyClient
from robot_client.drivers import run
from robot_client.rollout import Rollout
from sim import assets
from tests.server import messages, publishing
from tests.server.conftest import WIDTHS
from tests.server.fake_model import FakeModel
from tests.server.running import RunningServer, eventually, serving

SCREENSHOTS = os.environ.get("SCREENSHOTS")
HOSTILE = "<img src=x onerror=alert(1)> <script>alert(2)</script>"

CONTRAST = """() => {
  const part = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const rgba = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgba(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
  };
  const ratios = {};
  for (const node of document.querySelectorAll("body *")) {
    const texts = [...node.childNodes].filter((child) => child.nodeType === 3);
    const text = texts.map((child) => child.data).join("").trim();
    if (!text || !node.checkVisibility()) continue;
    const pair = [light(rgba(getComputedStyle(node).color)), light(ground(node))].sort((a, b) => b - a);
    ratios[text] = (pair[0] + 0.05) / (pair[1] + 0.05);
  }
  return ratios;
}"""
"""Text that is shown -> its contrast with what it stands on, by WCAG's formula."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with serving(FakeModel(), episodes=tmp_path, http_port=0) as running:
        yield running


def start(server: RunningServer, **fields) -> str:
    return server.policy.StartEpisode(messages.start(**fields)).episode_id


def store(server: RunningServer, greys=(10, 200), *, instruction: str = "open the drawer", **end) -> None:
    episode_id = start(server, arm="franka", task="kitchen/3")
    for decision, grey in enumerate(greys):
        server.policy.Act(messages.act(episode_id, decision, grey=grey, instruction=instruction))
    server.policy.EndEpisode(messages.end(episode_id, **end))


def words(page: Any, selector: str) -> str:
    return " ".join(page.inner_text(selector).split())


def has_loaded(page: Any, selector: str) -> None:
    page.wait_for_function("(s) => document.querySelector(s)?.naturalWidth > 0", arg=selector)


def test_each_robot_is_shown_with_its_frame_instruction_rate_age_and_version(server, look):
    page = look(server)
    assert "No robot has an open episode." in words(page, "#robots")
    episodes = {arm: start(server, arm=arm, task="kitchen/3") for arm in ("franka", "ur")}
    for arm, episode_id in episodes.items():
        for decision in range(2):
            server.policy.Act(messages.act(episode_id, decision, instruction=f"{arm} opens the drawer"))
    page.wait_for_function("() => document.querySelectorAll('.robot').length === 2")
    has_loaded(page, ".robot:nth-child(2) img")
    for index, arm in enumerate(episodes):
        card = words(page, f".robot:nth-child({index + 1})")
        assert card.startswith(f"{arm} version 0 {arm} opens the drawer")
        assert " / s" in card and "s old" in card and "kitchen/3" in card
    assert words(page, "#figures").startswith("Live version 0 Robots 2")


def test_a_robot_goes_on_in_its_card_from_episode_to_episode(server, look):
    page = look(server)
    for episode in range(3):
        episode_id = start(server, arm="franka")
        server.policy.Act(messages.act(episode_id, 0, instruction=f"episode {episode}"))
        page.wait_for_function(
            "(text) => document.querySelector('.robot')?.innerText.includes(text)", arg=f"episode {episode}"
        )
        server.policy.EndEpisode(messages.end(episode_id))
        page.wait_for_selector(".robot.gone")
    assert page.locator(".robot").count() == 1


def test_a_silent_robot_is_marked(server, look):
    start(server, arm="franka")
    page = look(server)
    page.wait_for_selector(".robot .silent")
    assert "silent" in words(page, ".robot .age")


def test_queue_batches_and_rate_are_drawn(server, look):
    page = look(server)
    episode_id = start(server)
    for decision in range(5):
        server.policy.Act(messages.act(episode_id, decision))
    for plot in ("#queue-plot", "#batch-plot", "#rate-plot"):
        page.wait_for_function("(s) => document.querySelector(s).getAttribute('d')?.length > 5", arg=f"{plot} path")


def test_words_of_a_client_are_shown_as_they_are_and_never_run(server, look):
    store(server, instruction=HOSTILE, outcome=episode_pb2.OUTCOME_ERROR, message=HOSTILE)
    episode_id = start(server, arm=HOSTILE, task=HOSTILE)
    server.policy.Act(messages.act(episode_id, 0, instruction=HOSTILE))
    page = look(server)
    assert words(page, ".robot .arm") == words(page, ".robot .instruction") == HOSTILE
    page.click("#episode-rows button")
    assert words(page, "#player-title") == HOSTILE
    assert HOSTILE in words(page, "#facts")
    assert page.evaluate("() => document.querySelectorAll('script, [onerror]').length") == 1  # the page's own


def test_a_lost_server_is_said_to_be_lost_and_found_again(look):
    port = free_port()
    with serving(FakeModel(), http_port=port) as server:
        page = look(server)
    page.wait_for_selector("#connection.lost")
    assert words(page, "#connection").startswith("Connection lost")
    assert page.evaluate("() => getComputedStyle(document.querySelector('main')).opacity") < "1"
    with serving(FakeModel(), http_port=port):
        page.wait_for_selector("#connection.serving")
        assert words(page, "#connection") == "Serving"


def test_an_episode_is_played_back_with_the_keyboard_alone(server, look):
    store(server, (10, 120, 250), outcome=episode_pb2.OUTCOME_FAILURE)
    page = look(server)
    page.wait_for_selector("#episode-rows button")
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.matches('#episode-rows button')"):
            break
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('#position').textContent === '3 / 3'")  # it plays by itself
    page.keyboard.press("Tab")
    page.keyboard.press("Home")
    assert words(page, "#position") == "1 / 3"
    page.keyboard.press("ArrowRight")
    assert words(page, "#position") == "2 / 3"
    has_loaded(page, "#player-frame")
    assert re.fullmatch(r"episodes/[\dT]+-[0-9a-f]+/frames/1", page.get_attribute("#player-frame", "src"))
    assert words(page, "#facts").startswith("Outcome failure Version 0 Task kitchen/3 Arm franka")
    page.keyboard.press("Escape")
    assert not page.is_visible("#player")


def test_newer_episodes_are_announced_and_shown_when_asked_for(server, look):
    store(server)
    page = look(server)
    page.wait_for_selector("#episode-rows tr")
    store(server), store(server)
    page.wait_for_selector("#newer")
    page.wait_for_function("() => document.querySelector('#newer').innerText === 'Show 2 newer'")
    assert page.locator("#episode-rows tr").count() == 1
    page.click("#newer")
    page.wait_for_function("() => document.querySelectorAll('#episode-rows tr').length === 3")
    assert not page.is_visible("#newer")


def mean_grey(page: Any) -> float:
    """Of the frame in the player."""
    has_loaded(page, "#player-frame")
    return page.evaluate("""() => {
      const canvas = document.createElement("canvas").getContext("2d");
      canvas.drawImage(document.querySelector("#player-frame"), 0, 0);
      return canvas.getImageData(2, 2, 1, 1).data[0];
    }""")


def test_of_another_server_on_the_same_port_its_own_episodes_are_shown(look, tmp_path):
    port = free_port()
    with serving(FakeModel(), episodes=tmp_path / "one", http_port=port) as server:
        store(server, (10,), instruction="open the drawer")
        page = look(server)
        page.click("#episode-rows button")
        assert mean_grey(page) == pytest.approx(10, abs=3)
        page.keyboard.press("Escape")
    with serving(FakeModel(), episodes=tmp_path / "other", http_port=port) as server:
        page.wait_for_function("() => document.querySelector('#episodes').innerText.includes('No episode has ended')")
        assert not page.is_visible("#episode-table")
        store(server, (200,), instruction="close the drawer")
        page.wait_for_selector("#episode-rows button")
        page.wait_for_function("() => document.querySelector('#episode-rows').innerText.includes('close the drawer')")
        page.click("#episode-rows button")
        page.wait_for_function("() => document.querySelector('#player-frame').complete")
        assert mean_grey(page) == pytest.approx(200, abs=3)
    with serving(FakeModel(), http_port=port):
        page.keyboard.press("Escape")
        page.wait_for_function("() => document.querySelector('#episodes').innerText.includes('keeps no episodes')")
        assert not page.is_visible("#episode-table")


def test_without_a_store_the_page_says_so(look):
    with serving(FakeModel(), http_port=0) as server:
        page = look(server)
        page.wait_for_function("() => document.querySelector('#episodes').innerText.includes('keeps no episodes')")


def test_swaps_are_listed_with_the_note_of_what_went_live(tiny_model, base, tmp_path, look):
    versions = VersionStore(tmp_path / "versions", first=tiny_model.fingerprint(tiny_model.first))
    with serving(tiny_model, max_batch=8, versions=versions, admin_port=0, http_port=0) as server:
        with grpc.insecure_channel(server.admin_address) as channel:
            admin = admin_pb2_grpc.AdminStub(channel)
            publishing.publish(admin, base, 0.01, set_live=True, note=HOSTILE)
            admin.SetLive(admin_pb2.SetLiveRequest(version=0), timeout=30)
        page = look(server)
        assert words(page, "#swap-list li:nth-child(1) span:nth-child(2)") == "1 to 0"
        assert words(page, "#swap-list li:nth-child(2)").endswith(f"0 to 1 {HOSTILE}")


def populated(server: RunningServer) -> None:
    """Everything there is to show, with words as long as they come."""
    long = "pneumonoultramicroscopicsilicovolcanoconiosis" * 3
    store(server, outcome=episode_pb2.OUTCOME_SUCCESS)
    store(server, instruction=long, outcome=episode_pb2.OUTCOME_FAILURE)
    store(server, outcome=episode_pb2.OUTCOME_ERROR, message=long)
    for arm in ("franka", long, "ur", "so100"):
        server.policy.Act(messages.act(start(server, arm=arm, task=long), 0, instruction=long))


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_out_of_sight_at_this_width(server, look, width):
    populated(server)
    page = look(server, width=width)
    page.wait_for_selector("#episode-rows tr:nth-child(3)")
    inside = "(s) => [...document.querySelectorAll(s)].every((n) => n.getBoundingClientRect().right <= innerWidth)"
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(inside, "button, .robot, figure, td, #figures div")
    page.click("#episode-rows tr:nth-child(2) button")
    assert page.evaluate(inside, "#player, #player *")
    page.keyboard.press("Escape")
    assert page.is_visible("#episodes")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast_enough(server, look, scheme):
    populated(server)
    page = look(server, scheme=scheme)
    page.wait_for_selector("#episode-rows tr:nth-child(3)")
    page.click("#episode-rows tr:nth-child(1) button")
    ratios = page.evaluate(CONTRAST)
    assert len(ratios) > 40
    assert {text: ratio for text, ratio in ratios.items() if ratio < 4.5} == {}
    ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(19, 22, 25)") == (scheme == "dark")


def test_nothing_moves_while_the_figures_change(server, look):
    store(server)
    page = look(server)
    episode_id = start(server, arm="franka")
    server.policy.Act(messages.act(episode_id, 0))
    has_loaded(page, ".robot img")
    page.evaluate("""() => {
      window.shifts = [];
      new PerformanceObserver((list) => shifts.push(...list.getEntries().map((entry) => entry.value)))
        .observe({ type: "layout-shift" });
    }""")
    for decision in range(1, 4):
        server.policy.Act(messages.act(episode_id, decision, instruction="open the drawer " * (decision % 2 + 1)))
        page.wait_for_selector(f".robot img[src$='decision={decision + 1}']")
    server.policy.EndEpisode(messages.end(episode_id))
    page.wait_for_selector(".robot.gone")
    server.policy.Act(messages.act(start(server, arm="franka"), 0))
    page.wait_for_selector(".robot:not(.gone)")
    page.wait_for_selector("#newer")
    assert page.evaluate("() => shifts") == []


def drive(server: RunningServer, arm: int, stopped: threading.Event) -> None:
    """One arm, episode after episode."""
    tasks = ("pick up the milk and place it in the basket", "put the bowl on the plate", "turn on the stove")
    task = Task(name=f"table/{arm}", instruction=tasks[arm], max_ticks=40)
    rollouts = iter(lambda: None if stopped.is_set() else Rollout(task=task), None)
    with PolicyClient(server.address, stream=True) as client:
        for _ in run(KinematicArm(lockstep=True), rollouts, client):
            pass


@contextlib.contextmanager
def robots(server: RunningServer, scratch: Path) -> Iterator[None]:
    """For the pictures, LIBERO's where it is installed; else three arms without dynamics."""
    if SCREENSHOTS and assets.has_libero():
        command = [sys.executable, "-m", "sim", "evaluate", "--server", server.address, "--out", str(scratch)]
        command += ["--tasks", "0", "1", "2", "--episodes-per-task", "4", "--slots", "2", "--videos", "0"]
        evaluation = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            evaluation.terminate()
            evaluation.wait(60)
        return
    stopped = threading.Event()
    arms = [threading.Thread(target=drive, args=(server, arm, stopped)) for arm in range(3)]
    for arm in arms:
        arm.start()
    try:
        yield
    finally:
        stopped.set()
        for arm in arms:
            arm.join(60)


@pytest.mark.timeout(900)
def test_the_page_of_a_working_lab(look, tmp_path):
    from policy_server.vla.checkpoint import load_checkpoint
    from policy_server.vla.policy import Policy
    from policy_server.vla_model import VlaModel

    pictures = Path(SCREENSHOTS) if SCREENSHOTS else tmp_path
    nano = VlaModel(Policy.load("nano"), name="nano", max_batch=8)
    versions = VersionStore(tmp_path / "versions", first=nano.fingerprint(nano.first))
    options = {"max_batch": 8, "queue": 64, "versions": versions, "admin_port": 0, "http_port": 0}
    with serving(nano, episodes=tmp_path / "episodes", **options) as server, robots(server, tmp_path / "evaluation"):
        page = look(server)
        with grpc.insecure_channel(server.admin_address) as channel:
            admin = admin_pb2_grpc.AdminStub(channel)
            publishing.publish(admin, load_checkpoint("nano").model, 1e-6, set_live=True, note="published by this test")
        eventually(lambda: newest(page) >= 3, within_s=600)
        has_loaded(page, ".robot:nth-child(3) img")
        page.wait_for_function("() => Number(document.querySelector('#rate').textContent) > 0")
        assert words(page, "#swap-list li").endswith("0 to 1 published by this test")
        for width in WIDTHS:
            seen = look(server, width=width)
            seen.wait_for_selector("#episode-rows tr:nth-child(3)")
            seen.wait_for_function(
                "() => [...document.querySelectorAll('.robot img')].every((image) => image.naturalWidth > 0)"
            )
            seen.screenshot(path=pictures / f"page_{width}.png")
            seen.click("#episode-rows tr:nth-child(1) button")
            has_loaded(seen, "#player-frame")
            seen.screenshot(path=pictures / f"episode_{width}.png")
        assert {path.name for path in pictures.glob("*.png")} >= {f"page_{width}.png" for width in WIDTHS}


def newest(page: Any) -> int:
    return page.evaluate("async () => (await (await fetch('state')).json()).newest_episode")
