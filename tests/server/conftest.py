"""A server on the tiny VLA that takes new weights, and a browser that looks at a server's page."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from policy_server.version_store import VersionStore
from policy_server.vla.checkpoint import load_checkpoint
from policy_server.vla.model import VLA
from policy_server.vla.policy import Policy
from policy_server.vla_model import VlaModel
from protos import admin_pb2_grpc
from tests.server.running import RunningServer, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = {1280: 860, 400: 860}
"""Of a window, and how high it is."""


@pytest.fixture(scope="session")
def tiny_model(tiny_vla: Path) -> VlaModel:
    return VlaModel(Policy.load(tiny_vla), name="tiny", max_batch=8)


@pytest.fixture
def admin_server(tiny_model: VlaModel, tmp_path: Path) -> Iterator[RunningServer]:
    store = VersionStore(tmp_path / "versions", first=tiny_model.fingerprint(tiny_model.first))
    with serving(tiny_model, max_batch=8, queue=64, versions=store, admin_port=0) as running:
        yield running


@pytest.fixture
def admin(admin_server: RunningServer) -> Iterator[admin_pb2_grpc.AdminStub]:
    with grpc.insecure_channel(admin_server.admin_address) as channel:
        yield admin_pb2_grpc.AdminStub(channel)


@pytest.fixture
def base(tiny_vla: Path) -> VLA:
    return load_checkpoint(tiny_vla).model


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def look(browser) -> Iterator[Callable[..., Any]]:
    """look(server, width=..., scheme=...): the page of a server, once it has heard from it.

    At the end: nothing was asked of anybody else, and no script failed or was stopped by the policy.
    """
    pages: list[Any] = []
    strangers: list[str] = []
    troubles: list[str] = []

    def opened(server: RunningServer, *, width: int = 1280, scheme: str = "light") -> Any:
        origin = f"http://127.0.0.1:{server.server.http_port}"
        page = browser.new_page(viewport={"width": width, "height": WIDTHS[width]}, color_scheme=scheme)
        page.set_default_timeout(60_000)
        page.on("request", lambda asked: asked.url.startswith(origin) or strangers.append(asked.url))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda said: "Content Security" not in said.text or troubles.append(said.text))
        page.goto(origin)
        page.wait_for_selector("#connection.serving")
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert strangers == [] and troubles == []
