"""The report and the live page in headless Chromium, on a desktop and on a phone, light and dark: accessibility by axe,
nothing in the console, nothing wider than the screen.

Needs `pip install 'fastgrpo[browser]'` and a Chromium: Debian's package, or `playwright install chromium`.
"""

import shutil
import threading

import pytest
from support.report_runs import make_run

from fastgrpo.commands.report import write_report
from fastgrpo.commands.watch import LivePage, Server

SCREENS = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True},
}


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs fastgrpo[browser]: playwright")
    pytest.importorskip("axe_playwright_python", reason="needs fastgrpo[browser]: axe-playwright-python")
    with playwright.sync_playwright() as started:
        path = shutil.which("chromium")
        try:
            browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium to start: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    """Of the report as a file, and of the live page."""
    run = make_run(tmp_path_factory.mktemp("runs") / "first")
    with Server(LivePage(run), 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield {"report": write_report(run).as_uri(), "watch": f"http://localhost:{server.server_address[1]}/"}
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("which", ["report", "watch"])
def test_a_page_is_accessible_silent_and_as_wide_as_the_screen(chromium, addresses, which, screen, scheme):
    from axe_playwright_python.sync_playwright import Axe  # pyright: ignore[reportMissingImports]

    context = chromium.new_context(color_scheme=scheme, **SCREENS[screen])
    page = context.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url))
    page.goto(addresses[which])
    page.wait_for_load_state("networkidle")
    assert not said
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("svg").count() >= 5
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark == ("rgb(18, 22, 28)" if scheme == "dark" else "rgb(251, 252, 253)")
    found = Axe().run(page).response["violations"]
    assert not found, [(v["id"], v["nodes"][0]["html"]) for v in found]
    context.close()


def test_the_live_page_takes_what_was_made_since_and_says_when_nobody_answers(chromium, tmp_path):
    from playwright.sync_api import expect  # pyright: ignore[reportMissingImports]

    run = make_run(tmp_path / "first", iterations=20)
    with Server(LivePage(run, every=0.0), 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        page = chromium.new_page()
        page.clock.install()
        page.goto(f"http://localhost:{server.server_address[1]}/")
        assert "in 20 of 40 iterations" in page.inner_text("main")
        make_run(run, iterations=30)
        page.clock.run_for(61_000)
        expect(page.locator("main")).to_contain_text("in 30 of 40 iterations")
        server.shutdown()
        thread.join()
    page.clock.run_for(61_000)
    expect(page.locator(".live")).to_contain_text("no answer")
    page.close()
