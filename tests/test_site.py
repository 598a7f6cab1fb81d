"""The built documentation in a browser: every page opens, search finds, the calculator is right.

`make test-docs` builds the site, sets SIGNAX_SITE to its folder, and runs these tests. They need
Chromium (on Debian `apt-get install chromium`) and are skipped without it.
"""

import functools
import http.server
import os
import pathlib
import shlex
import shutil
import threading

import pytest

from signax import cost

SITE = pathlib.Path(os.environ.get("SIGNAX_SITE", ""))
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
BUILT = "SIGNAX_SITE" in os.environ
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html")) if BUILT else []
PAGES = [name for name in PAGES if not name.startswith("_static/")]  # the theme's parts

pytestmark = [
    pytest.mark.skipif(not BUILT, reason="make test-docs runs these"),
    pytest.mark.skipif(BUILT and CHROMIUM is None, reason="Chromium is not installed"),
]

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}

# What users of such systems type into the search, and the page that answers.
ANSWERS = {
    "speed-up": "questions",
    "pay": "calculator",
    "memory copies": "choose",
    "ZeRO": "questions",
    "FSDP sharded": "training_loops",
    "scalars leaves shape": "questions",
    "checkpoint": "checkpoints",
    "resize workers": "checkpoints",
    "machine dies": "faults",
    "NaN": "faults",
    "language model loss": "performance",
    "clipping accumulation": "training_loops",
}


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        del format, args


@pytest.fixture(scope="module")
def address():
    handler = functools.partial(Handler, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")  # in the environment of the documentation
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, address):
    """A tab that fails the test if a script fails, or a request fails or leaves the machine."""
    tab = browser.new_page(viewport=DESKTOP)
    wrong = []
    tab.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("response", lambda found: found.status >= 400 and wrong.append(found.url))

    def check(request):
        if not request.url.startswith((address, "data:", "blob:")):
            wrong.append(f"leaves the machine: {request.url}")

    tab.on("request", check)
    yield tab
    tab.close()
    assert not wrong


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_its_mathematics_and_pictures_and_fits_a_phone(tab, address, name):
    tab.goto(f"{address}/{name}")
    if tab.locator(".math").count():
        tab.wait_for_function(
            "[...document.querySelectorAll('.math')].every(it => it.querySelector('mjx-container'))"
        )
    assert tab.locator("mjx-merror").count() == 0
    tab.locator("img").evaluate_all("images => images.forEach(it => { it.loading = 'eager'; })")
    tab.wait_for_load_state("networkidle")
    broken = "images => images.filter(it => !(it.complete && it.naturalWidth)).map(it => it.src)"
    assert tab.locator("img").evaluate_all(broken) == []
    tab.set_viewport_size(PHONE)
    assert tab.evaluate("document.scrollingElement.scrollWidth") <= PHONE["width"]


def results_of(tab, address, query):
    """The addresses that the site's search finds, best first."""
    tab.goto(f"{address}/search.html?q={query.replace(' ', '+')}")
    tab.wait_for_selector("#search-results p.search-summary:has-text('found')")
    return tab.locator("#search-results ul.search li a").evaluate_all(
        "links => links.map(link => link.pathname)"
    )


def test_search_finds_a_function(tab, address):
    found = results_of(tab, address, "majority_vote")
    assert any(path.startswith("/api/") for path in found[:3])


@pytest.mark.parametrize("query", ANSWERS)
def test_search_finds_the_page_that_answers(tab, address, query):
    assert f"/{ANSWERS[query]}.html" in results_of(tab, address, query)[:5]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parameters": 0},
        {"parameters": 12, "workers": 18},
        {"parameters": 40, "workers": 0, "link": 10},
        {"parameters": 80, "workers": 8, "link": 69, "stepTime": 69},
        {"workers": 1, "stepTime": 0, "dtype": "bf16"},
        {"localSteps": 3},
        {"localSteps": 9, "link": 20, "dtype": "f16"},
        {"latency": 0, "memory": 0},
        {"parameters": 55, "latency": 49, "memory": 49, "workers": 14},
    ],
)
def test_the_calculator_equals_the_command(tab, address, capsys, changes):
    tab.goto(f"{address}/calculator.html")
    for name, value in changes.items():
        field = tab.locator(f"#cost [name={name}]")
        if name == "dtype":
            field.select_option(value)
        else:
            field.evaluate(
                "(it, value) => { it.value = value;"
                " it.dispatchEvent(new Event('input', {bubbles: true})); }",
                value,
            )
            assert int(field.input_value()) == value
    command = tab.locator("#cost-command").inner_text()
    assert command.startswith("python -m signax.cost ")
    args = cost.parse_arguments(shlex.split(command)[3:])
    costs = cost.estimate(**vars(args))
    shown = tab.locator("#cost-rows tr").evaluate_all("rows => rows.map(it => ({...it.dataset}))")
    assert [row["method"] for row in shown] == list(costs)
    for row, expected in zip(shown, costs.values(), strict=True):
        found = [float(row[name]) for name in ("bytes", "exchange", "step")]
        assert found == pytest.approx(expected, rel=0.01)
    advice = cost.recommend(costs, args.step_time).replace(
        "--buckets or --local-steps", "the buckets or the local steps"
    )
    assert tab.locator("#cost-advice").inner_text() == advice
