"""A studio that serves a folder with a picture, its mask, a model and an empty corner."""

import shutil
import threading
from types import SimpleNamespace

import pytest
from asking import ask
from benchmarks.studio_journey import CHROMIUM, FLAGS
from browsing import LONG

from midilite.commands.infer import EXAMPLE
from midilite.studio.options import StudioOptions
from midilite.studio.server import open_server


@pytest.fixture
def start(tmp_path, quick_model):
    """The start folder, and something beside it that nobody may see."""
    (tmp_path / "secret.png").write_bytes(b"SECRET")
    folder = tmp_path / "start"
    folder.mkdir()
    for name in ("rgb.png", "seg.png"):
        shutil.copy(EXAMPLE / name, folder / name)
    shutil.copytree(quick_model, folder / "model")
    (folder / "leads-out.png").symlink_to(tmp_path / "secret.png")
    return folder


@pytest.fixture(scope="module")
def browser():
    """One for all tests of a file: starting it takes seconds, a context of its own nothing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(params=[{"viewport": {"width": 1280, "height": 720}}], ids=["desk"])
def page(browser, request):
    """A page of 1280 x 720, or as a test asks, for itself alone; errors in its scripts fail the test."""
    context = browser.new_context(**request.param, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(LONG)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []


@pytest.fixture
def studio(start):
    """The server, and `ask` for it; its thread and jobs end with the test."""
    server = open_server(StudioOptions(folder=str(start), port=0, device="cpu"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield SimpleNamespace(server=server, ask=lambda *given, **more: ask(server, *given, **more), start=start)
    server.shutdown()
    server.server_close()
    assert server.studio.jobs.close() and server.is_idle(20)
