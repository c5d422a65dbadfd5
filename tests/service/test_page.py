"""The page, in a browser, as its users see it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest

from tests.service.running import Serve, Service

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome")
FOUND = [path for name in NAMES if (path := shutil.which(name))]
CHROMIUM = os.environ.get("EVENTRAIN_CHROMIUM") or (FOUND[0] if FOUND else None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here; see EVENTRAIN_CHROMIUM")

ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = "<img src=x onerror=alert(1)> & enough"
NO_NUMBER = "\N{EN DASH}"

Page = Any
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """Opens addresses, each in a browser of its own; what goes wrong there fails the test."""
    wrong: list[str] = []
    contexts = []

    def open_page(url: str, **options: Any) -> Page:
        contexts.append(context := browser.new_context(**options))
        context.set_default_timeout(60_000)
        context.on("weberror", lambda web: wrong.append(str(web.error)))
        context.on("console", lambda line: wrong.append(line.text) if _is_wrong(line) else None)
        context.on("request", lambda r: None if _is_own(r.url) else wrong.append(r.url))
        page = context.new_page()
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def _is_wrong(line: Any) -> bool:
    """Errors, such as those against the policy; not that the service refused something."""
    return line.type in ("error", "warning") and "Failed to load resource" not in line.text


def _is_own(url: str) -> bool:
    return re.match(r"http://127\.0\.0\.1:\d+/|data:", url) is not None


@pytest.fixture(scope="module")
def ended(service: Service) -> str:
    """A run of three epochs that has ended."""
    run_id = service.start(epochs=3, batch_size=128)
    assert service.wait(run_id)["status"] == "completed"
    return run_id


@pytest.fixture
def running(service: Service) -> Iterator[str]:
    """A run that takes longer than a test."""
    run_id = service.start(epochs=1000)
    yield run_id
    service.client.post(f"/runs/{run_id}/stop", json={})
    service.wait(run_id)


def status(page: Page, expected: str) -> None:
    sync_api.expect(page.locator("#status")).to_have_text(expected, timeout=60_000)


def table(page: Page, name: str) -> list[list[str]]:
    """The rows of the table behind a chart, or of the batches."""
    page.locator(f"#{name} details, details#{name}").evaluate("node => node.open = true")
    rows = page.locator(f"#{name} tbody tr")
    rows.first.wait_for()
    script = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    found: list[list[str]] = rows.evaluate_all(script)
    return found


def await_rows(page: Page, n: int) -> None:
    """Wait until that many epochs are in the table of the loss."""
    script = "n => document.querySelectorAll('#loss tbody tr').length >= n"
    page.wait_for_function(script, arg=n)


def await_state(page: Page, state: Callable[[], Any], accept: Callable[[Any], bool]) -> None:
    """Wait until the service's state is accepted, and let the page go on meanwhile."""
    for _ in range(1200):
        if accept(found := state()):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"it stays at {found}")


def await_clients(page: Page, service: Service, run_id: str, n: int) -> None:
    """Wait until that many streams of a run are open."""
    await_state(page, lambda: service.state(run_id)["clients"], lambda found: found == n)


def await_epochs(page: Page, service: Service, run_id: str, n: int) -> None:
    """Wait until the service has done that many epochs, each with its two phases."""
    await_state(page, lambda: len(service.state(run_id)["history"]), lambda rows: rows >= 2 * n)


def pixels(page: Page, figure: str) -> str:
    """What is painted on a chart."""
    script = "name => document.querySelector(`#${name} canvas`).toDataURL()"
    painted: str = page.evaluate(script, figure)
    return painted


def ink(page: Page, figure: str, colour: str) -> int:
    """How many pixels of a chart are of a colour."""
    found: int = page.locator(f"#{figure} canvas").evaluate(
        """(canvas, name) => {
          const colour = getComputedStyle(canvas).getPropertyValue(name).trim();
          const rgb = colour.match(/[0-9a-f]{2}/g).map(hex => parseInt(hex, 16));
          const { width, height } = canvas;
          const copy = Object.assign(document.createElement("canvas"), { width, height });
          const context = copy.getContext("2d", { willReadFrequently: true });
          context.drawImage(canvas, 0, 0);
          const { data } = context.getImageData(0, 0, width, height);
          let n = 0;
          for (let i = 0; i < data.length; i += 4) n += rgb.every((c, j) => c === data[i + j]);
          return n;
        }""",
        colour,
    )
    return found


def history(state: dict[str, Any], metric: str, scale: float = 1) -> list[list[float]]:
    """The rows that the API's history has, as a table shows them."""
    rows: dict[int, list[float]] = {}
    for row in state["history"]:
        rows.setdefault(row["epoch"], [row["epoch"] + 1]).append(scale * row[metric])
    return list(rows.values())


def numbers(rows: list[list[str]]) -> list[Any]:
    """What the cells say; an epoch that was left has no number for what it did not do."""
    found = ([float(cell) for cell in row if cell != NO_NUMBER] for row in rows)
    return [pytest.approx(row, rel=1e-3, abs=6e-3) for row in found]


def test_a_run_started_in_the_form_grows_before_ones_eyes(service: Service, visit: Open) -> None:
    page = visit(service.url)
    page.fill("#epochs", "1000")
    page.click("text=Start run")
    page.wait_for_url(re.compile("#[0-9a-f]{16}$"))
    status(page, "running")
    table(page, "loss")
    await_rows(page, 1)
    before = pixels(page, "loss")
    assert ink(page, "loss", "--train") > 0
    n = len(table(page, "loss"))
    await_rows(page, n + 2)
    assert ink(page, "loss", "--valid") > 0
    assert pixels(page, "loss") != before
    sync_api.expect(page.locator("#status")).to_have_text("running")
    assert 0 < page.locator("#progress").evaluate("node => node.value") < 1
    assert re.match(r"Epoch \d+ of 1000", page.text_content("#where"))
    assert "samples/s" in page.text_content("#pace")
    assert page.locator("#log .line").count() >= 2 * n
    run_id = page.url[-16:]
    assert service.state(run_id)["clients"] == 1
    page.click("#stop")
    status(page, "cancelled")
    assert page.text_content("#runs a[aria-current] .status") == "cancelled"
    assert service.wait(run_id)["reason"] == "stopped by a client"


def test_stop_sends_the_reason_and_shows_it_as_text(
    service: Service, visit: Open, running: str
) -> None:
    page = visit(f"{service.url}/#{running}")
    status(page, "running")
    assert page.locator("#weights").is_hidden()
    page.fill("#reason", HOSTILE)
    page.click("#stop")
    status(page, "cancelled")
    assert service.wait(running)["reason"] == HOSTILE
    assert page.text_content("#ended") == f"Cancelled by Learner.stop: {HOSTILE}"
    sync_api.expect(page.locator("#log")).to_contain_text(HOSTILE)
    assert page.locator("img").count() == 0
    assert page.locator("#stop").is_disabled()
    with page.expect_download() as download:
        page.click("#weights")
    assert download.value.suggested_filename == f"{running}.pt"


def test_the_keyboard_alone_reaches_everything_and_stops(
    service: Service, visit: Open, running: str
) -> None:
    page = visit(f"{service.url}/#{running}")
    status(page, "running")
    reached = []
    while "stop" not in reached and len(reached) < 100:
        page.keyboard.press("Tab")
        here, outline = page.evaluate(
            "() => { const node = document.activeElement; return ["
            "node.id || node.hash || node.textContent, getComputedStyle(node).outlineStyle]; }"
        )
        assert outline != "none", here
        reached.append(here)
    form = ["dataset", "epochs", "lr", "batch_size", "seed", "Start run"]
    assert [name for name in reached if name in form] == form
    assert reached.index("Start run") < reached.index(f"#{running}") < reached.index("reason")
    page.keyboard.press("Enter")
    status(page, "cancelled")
    assert page.evaluate("document.activeElement.id") == "run"


def test_the_skip_link_goes_to_the_run_and_leaves_the_address(
    service: Service, visit: Open, ended: str
) -> None:
    page = visit(f"{service.url}/#{ended}")
    status(page, "completed")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "run"
    assert page.url.endswith(ended)


def test_an_error_of_a_field_is_shown_next_to_it(service: Service, visit: Open) -> None:
    page = visit(service.url)
    page.fill("#epochs", "0")
    page.fill("#lr", "fast")
    page.click("text=Start run")
    epochs, lr = page.locator("#epochs-error"), page.locator("#lr-error")
    sync_api.expect(epochs).to_have_text("Input should be greater than or equal to 1")
    sync_api.expect(lr).to_contain_text("valid number")
    assert page.get_attribute("#lr", "aria-invalid") == "true"
    assert page.get_attribute("#lr", "aria-describedby") == "lr-error"
    assert page.get_attribute("#seed", "aria-invalid") is None
    assert page.evaluate("document.activeElement.id") == "epochs"


def test_the_form_starts_with_the_defaults_of_the_service(service: Service, visit: Open) -> None:
    page = visit(service.url)
    schema = service.client.get("/openapi.json").json()["components"]["schemas"]["NewRun"]
    for name, field in schema["properties"].items():
        assert page.input_value(f"[name={name}]") == str(field["default"])


def test_each_chart_has_its_numbers_in_a_table(service: Service, visit: Open, ended: str) -> None:
    page, state = visit(f"{service.url}/#{ended}"), service.state(ended)
    status(page, "completed")
    assert numbers(table(page, "loss")) == history(state, "loss")
    assert numbers(table(page, "accuracy")) == history(state, "accuracy", 100)
    table(page, "throughput")
    sync_api.expect(page.locator("#throughput tbody")).not_to_contain_text(NO_NUMBER)
    speeds = table(page, "throughput")
    assert [row[0] for row in speeds] == ["1", "2", "3"]
    assert all(int(row[1].replace(",", "")) > 0 for row in speeds)
    for name in ("loss", "accuracy", "throughput"):
        described = page.get_attribute(f"#{name} .plot", "aria-label")
        assert re.search(r"train \d", described), described
        assert page.locator(f"#{name} caption").count() == 1
        assert page.locator(f"#{name} thead th[scope=col]").count() == 3
        assert page.locator(f"#{name} tbody th[scope=row]").count() == 3


def test_the_last_batches_stand_in_a_table_newest_first(
    service: Service, visit: Open, ended: str
) -> None:
    lines = service.client.get(f"/runs/{ended}/events").text.splitlines()
    told = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    batches = [record for record in reversed(told) if record["event"] == "batch"]
    page = visit(f"{service.url}/#{ended}")
    page.click("text=The last batches as a table")
    sync_api.expect(page.locator("#batches tbody tr")).to_have_count(len(batches))
    for row, record in zip(table(page, "batches"), batches, strict=True):
        done = record["epoch"] + (record["iter"] + 1) / record["n_iter"]
        assert row[:2] == [f"{done:.3f}", str(record["iter"] + 1)]
        assert [float(cell) for cell in row[2:4]] == [
            pytest.approx(record[key], abs=6e-5) for key in ("loss", "lr")
        ]


def test_a_second_tab_and_a_reload_show_the_same_history(
    service: Service, visit: Open, running: str
) -> None:
    page = visit(f"{service.url}/#{running}")
    table(page, "loss")
    await_rows(page, 2)
    seen = table(page, "loss")[:-1]
    page.reload()
    other = visit(f"{service.url}/#{running}")
    for tab in (page, other):
        table(tab, "loss")
        await_rows(tab, len(seen))
        assert table(tab, "loss")[: len(seen)] == seen
    page.click("#stop")
    for tab in (page, other):
        status(tab, "cancelled")
        assert numbers(table(tab, "loss")) == history(service.state(running), "loss")


LOOK = """seen => {
  const values = { hidden: !seen, visibilityState: seen ? "visible" : "hidden" };
  for (const [name, value] of Object.entries(values)) {
    Object.defineProperty(document, name, { value, configurable: true });
  }
  document.dispatchEvent(new Event("visibilitychange"));
}"""
"""Changes to a tab, or away from it: without a window, each tab is taken for a visible one."""


def test_eight_tabs_of_a_running_run_leave_connections_to_stop_it(
    service: Service, visit: Open, running: str
) -> None:
    """A browser has six connections to a host, whatever the number of its tabs."""
    tabs = [visit(f"{service.url}/#{running}")]
    while True:
        status(tabs[-1], "running")
        sync_api.expect(tabs[-1].locator("#link")).to_have_text("live")
        if len(tabs) == 8:
            break
        tabs[-1].evaluate(LOOK, False)
        tabs.append(tabs[-1].context.new_page())
        tabs[-1].goto(f"{service.url}/#{running}")
    await_clients(tabs[-1], service, running, 1)
    tabs[-1].click("#stop")
    status(tabs[-1], "cancelled")
    state = service.wait(running)
    for tab in tabs[:-1]:
        assert tab.text_content("#status") == "running"
        tab.evaluate(LOOK, True)
        status(tab, "cancelled")
        assert numbers(table(tab, "loss")) == history(state, "loss")


def test_a_tab_that_was_hidden_goes_on_where_it_was(
    service: Service, visit: Open, running: str
) -> None:
    page = visit(f"{service.url}/#{running}")
    table(page, "loss")
    await_rows(page, 1)
    page.evaluate(LOOK, False)
    await_clients(page, service, running, 0)
    n = len(table(page, "loss"))
    await_epochs(page, service, running, n + 2)
    assert len(table(page, "loss")) == n
    page.evaluate(LOOK, True)
    await_rows(page, n + 2)
    await_clients(page, service, running, 1)
    page.click("#stop")
    status(page, "cancelled")
    assert numbers(table(page, "loss")) == history(service.wait(running), "loss")
    lines = page.locator("#log .line").all_text_contents()
    assert len(lines) == len(set(lines))
    assert page.locator("#gap").is_hidden()


def test_a_tab_opened_in_the_background_connects_when_it_is_looked_at(
    service: Service, visit: Open, running: str
) -> None:
    page = visit("data:text/html,").context.new_page()
    page.add_init_script(f"({LOOK})(false)")
    page.goto(f"{service.url}/#{running}")
    page.wait_for_selector(f"#runs a[aria-current][href='#{running}']")
    assert service.state(running)["clients"] == 0
    page.evaluate(LOOK, True)
    status(page, "running")
    await_clients(page, service, running, 1)


def test_runs_are_listed_newest_first_and_have_addresses(
    service: Service, visit: Open, ended: str
) -> None:
    newest = service.start(epochs=1)
    service.wait(newest)
    page = visit(service.url)
    sync_api.expect(page.locator("#runs a").first).to_have_attribute("href", f"#{newest}")
    page.wait_for_url(f"**/#{newest}")
    page.click(f"#runs a[href='#{ended}']")
    sync_api.expect(page.locator("#run-title")).to_have_text("digits, 3 epochs")
    assert page.url.endswith(ended)
    assert page.get_attribute("#runs a[aria-current]", "href") == f"#{ended}"
    page.go_back()
    sync_api.expect(page.locator("#run-title")).to_have_text("digits, 1 epoch")


def test_an_address_of_no_run_says_so(service: Service, visit: Open) -> None:
    page = visit(f"{service.url}/#0123456789abcdef")
    sync_api.expect(page.locator("#no-run")).to_contain_text("No run 0123456789abcdef")


def test_losses_that_are_not_numbers_leave_gaps(service: Service, visit: Open) -> None:
    run_id = service.start(epochs=2, lr=10, batch_size=64, seed=1)
    assert service.wait(run_id)["history"][-1]["loss"] is None
    page = visit(f"{service.url}/#{run_id}")
    status(page, "completed")
    assert table(page, "loss")[-1] == ["2", NO_NUMBER, NO_NUMBER]
    assert all(float(cell) < 20 for cell in table(page, "accuracy")[-1])
    page.check("#log-scale")
    assert table(page, "loss")[-1] == ["2", NO_NUMBER, NO_NUMBER]


class Line:
    """A connection to the service that can be cut."""

    def __init__(self, service: Service) -> None:
        self._target = service.connect
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.whole = True
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if not self.whole:
                    near.close()
                    continue
                far = self._target()
                self._ends += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self.whole = False
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for end in (self._listener, *self._ends):
            end.close()


@pytest.fixture
def line(service: Service) -> Iterator[Line]:
    line = Line(service)
    yield line
    line.close()


def test_a_lost_connection_is_shown_and_continues_where_it_was(
    service: Service, visit: Open, running: str, line: Line
) -> None:
    page = visit(f"{line.url}/#{running}")
    table(page, "loss")
    await_rows(page, 1)
    line.cut()
    sync_api.expect(page.locator("#link")).to_have_text("reconnecting…")
    n = len(table(page, "loss"))
    await_epochs(page, service, running, n + 2)
    assert len(table(page, "loss")) == n
    line.whole = True
    sync_api.expect(page.locator("#link")).to_have_text("live", timeout=60_000)
    await_rows(page, n + 2)
    service.client.post(f"/runs/{running}/stop", json={}).raise_for_status()
    status(page, "cancelled")
    assert numbers(table(page, "loss")) == history(service.state(running), "loss")
    lines = page.locator("#log .line").all_text_contents()
    assert len(lines) == len(set(lines))
    assert page.locator("#gap").is_hidden()


@pytest.fixture(scope="module")
def small(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """Wants a token, has no Fashion-MNIST, does one run at a time, and holds six messages."""
    limits = ("--max-concurrent", 1, "--journal-size", 6)
    folder = tmp_path_factory.mktemp("no_data")
    small = serve(*limits, "--data", folder, EVENTRAIN_TOKEN="secret")
    small.client.headers["authorization"] = "Bearer secret"
    return small


def log_in(page: Page) -> None:
    page.fill("#token", "secret")
    page.keyboard.press("Enter")


def test_epochs_that_the_stream_has_lost_come_from_the_history(small: Service, visit: Open) -> None:
    run_id = small.start(epochs=4, batch_size=256)
    state = small.wait(run_id)
    page = visit(f"{small.url}/#{run_id}")
    log_in(page)
    status(page, "completed")
    sync_api.expect(page.locator("#gap")).to_contain_text("messages are no longer available")
    assert numbers(table(page, "loss")) == history(state, "loss")


def test_where_a_token_is_wanted_the_page_asks_for_it(small: Service, visit: Open) -> None:
    page = visit(small.url)
    sent = []
    page.on("request", lambda request: sent.append(request.url))
    page.wait_for_selector("#token")
    assert page.locator("#app").is_hidden()
    page.fill("#token", "guess")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#token-error")).to_have_text("The token is wrong")
    log_in(page)
    sync_api.expect(page.locator("#app")).to_be_visible()
    assert page.locator("#login").is_hidden()

    page.select_option("#dataset", "fashion-mnist")
    page.click("text=Start run")
    sync_api.expect(page.locator("#dataset-error")).to_contain_text("not on this server")
    page.select_option("#dataset", "digits")
    page.fill("#epochs", "1000")
    page.click("text=Start run")
    status(page, "running")
    assert page.text_content("#dataset-error") == ""
    page.click("text=Start run")
    sync_api.expect(page.locator("#run-form-error")).to_contain_text("runs are running")

    page.context.clear_cookies()
    page.click("#stop")
    sync_api.expect(page.locator("#login")).to_be_visible()
    log_in(page)
    status(page, "running")
    page.click("#stop")
    status(page, "cancelled")
    assert not any("secret" in url for url in sent)


@pytest.mark.parametrize("width", [320, 360, 700])
def test_nothing_sticks_out_of_a_narrow_window(
    service: Service, visit: Open, ended: str, width: int
) -> None:
    page = visit(f"{service.url}/#{ended}", viewport={"width": width, "height": 800})
    status(page, "completed")
    page.evaluate("document.querySelectorAll('details').forEach(node => node.open = true)")
    table(page, "loss")
    wide = "document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth"
    assert page.evaluate(wide) == 0
    assert page.locator("#loss canvas").bounding_box()["width"] <= width


def test_a_reason_without_spaces_does_not_widen_the_page(service: Service, visit: Open) -> None:
    run_id = service.start(epochs=1000)
    service.client.post(f"/runs/{run_id}/stop", json={"reason": "x" * 200}).raise_for_status()
    service.wait(run_id)
    page = visit(f"{service.url}/#{run_id}", viewport={"width": 360, "height": 800})
    status(page, "cancelled")
    assert page.evaluate("document.scrollingElement.scrollWidth") == 360


CONTRASTS = """() => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b]
    .map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = node => {
    const colour = parse(getComputedStyle(node).backgroundColor);
    return colour[3] === 0 ? behind(node.parentElement) : colour;
  };
  const own = node => [...node.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  return [...document.body.querySelectorAll("*")]
    .filter(node => own(node) && node.checkVisibility() && !node.disabled)
    .map(node => {
      const text = light(parse(getComputedStyle(node).color)), paper = light(behind(node));
      const [low, high] = [text, paper].sort((a, b) => a - b);
      return [node.textContent.slice(0, 30), text > paper, (high + .05) / (low + .05)];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_in_both_schemes(
    service: Service, visit: Open, ended: str, scheme: str
) -> None:
    page = visit(f"{service.url}/#{ended}", color_scheme=scheme)
    status(page, "completed")
    page.fill("#epochs", "0")
    page.click("text=Start run")
    sync_api.expect(page.locator("#epochs-error")).not_to_be_empty()
    table(page, "loss")
    measured = page.evaluate(CONTRASTS)
    assert len(measured) > 40
    assert [found for found in measured if found[2] < 4.5] == []
    light_on_dark = [found[0] for found in measured if found[1]]
    if scheme == "dark":
        assert "Start run" not in light_on_dark
        assert len(light_on_dark) == len(measured) - 1
    else:
        assert light_on_dark == ["Start run"]


def test_charts_follow_the_scheme_and_the_size(service: Service, visit: Open, ended: str) -> None:
    page = visit(f"{service.url}/#{ended}", color_scheme="light")
    table(page, "loss")
    light, width = pixels(page, "loss"), page.locator("#loss canvas").bounding_box()["width"]
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "light => document.querySelector('#loss canvas').toDataURL() !== light", arg=light
    )
    page.set_viewport_size({"width": 500, "height": 800})
    page.wait_for_function(
        "width => document.querySelector('#loss canvas').clientWidth < width", arg=width
    )


def test_inputs_have_labels_and_headings_are_in_order(
    service: Service, visit: Open, ended: str
) -> None:
    page = visit(f"{service.url}/#{ended}")
    status(page, "completed")
    unlabelled = "[...document.querySelectorAll('input, select')].filter(n => !n.labels.length)"
    assert page.evaluate(f"{unlabelled}.length") == 0
    levels = page.locator(":is(h1, h2, h3):visible").evaluate_all(
        "nodes => nodes.map(node => Number(node.tagName[1]))"
    )
    assert levels == [1, 2, 2, 2, 3, 3, 3, 3]
    assert page.locator("main:visible").count() == page.locator("nav:visible").count() == 1
    assert page.get_attribute("html", "lang") == "en"


def test_points_without_end_take_a_bounded_place(service: Service, visit: Open) -> None:
    page = visit(service.url)
    kept = page.evaluate(
        """async () => {
          const { Thinned } = await import("/page/run.js");
          const thinned = new Thinned(100);
          let most = 0;
          for (let i = 0; i < 100000; i += 1) {
            thinned.push(i);
            most = Math.max(most, thinned.items.length);
          }
          return { most, points: thinned.points };
        }"""
    )
    *regular, newest = kept["points"]
    assert 50 <= len(regular) <= kept["most"] <= 100
    assert len({b - a for a, b in pairwise(regular)}) == 1
    assert regular[0] == 0
    assert regular[-1] > 97_000
    assert newest == 99_999


def test_a_log_line_of_a_full_second_has_its_milliseconds_too(
    service: Service, visit: Open
) -> None:
    page = visit(service.url, timezone_id="UTC")
    times = page.evaluate(
        """async () => {
          const { drawLog } = await import("/page/log.js");
          const line = { level: "info", message: "here", fields: {} };
          const times = ["2026-01-02T03:04:05Z", "2026-01-02T03:04:05.067890Z"];
          document.getElementById("log").replaceChildren();
          drawLog({ lines: times.map((timestamp) => ({ ...line, timestamp })) });
          return [...document.querySelectorAll("#log time")].map((node) => node.textContent);
        }"""
    )
    assert times == ["03:04:05.000", "03:04:05.067"]
