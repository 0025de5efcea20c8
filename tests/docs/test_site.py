"""The documentation as a site: it builds without a warning, names every public name, and works in a browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pages import DOCS, NOTEBOOKS, ROOT

import revwire

pytest.importorskip("mkdocs", reason="needs MkDocs: pip install -e '.[docs]'")
pytest.importorskip("mkdocstrings", reason="needs mkdocstrings: pip install -e '.[docs]'")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def browser() -> Iterator[Any]:
    """Playwright's Chromium, or one that is installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install -e '.[docs]'")
    with playwright.sync_playwright() as running:
        own = Path(running.chromium.executable_path).exists()
        found = None if own else next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), "")
        if found == "":
            pytest.skip("needs a browser: playwright install chromium")
        started = running.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


def test_the_reference_has_every_public_name(site: Path) -> None:
    pages = "".join(path.read_text() for path in site.glob("reference/*/index.html"))
    packages = {"revwire": revwire, "revwire.couplings": revwire.couplings, "revwire.measure": revwire.measure}
    names = {f"{package}.{name}" for package, module in packages.items() for name in module.__all__}
    shown = {name for name in names if f'id="{name}"' in pages or f'id="revwire.couplings.{name[8:]}"' in pages}
    assert names == shown
    assert all(f'id="revwire.testing.{name}"' in pages for name in ("check_invertible", "check_gradients"))
    assert all(
        f'id="revwire.lightning.{name}"' in pages for name in ("RevwireCallback", "ConfigCallback", "CouplingCallback")
    )
    assert 'id="revwire.huggingface.RevwireCallback"' in pages


def test_the_reference_has_the_command_line(site: Path) -> None:
    page = (site / "reference/command-line/index.html").read_text()
    for command in ("plan", "verify", "profile", "doctor", "demo"):
        assert f'id="revwire-{command}"' in page
    assert "memory-budget BYTES" in page


def test_the_search_knows_what_a_reader_asks_for(site: Path) -> None:
    entries = json.loads((site / "search/search_index.json").read_text())["docs"]
    text = " ".join(entry["title"] + entry["text"] for entry in entries)
    assert all(word in text for word in ("convert", "memory_budget", "ReconstructionError", "swin3d_t"))


def test_notebooks_and_results_are_in_it(site: Path) -> None:
    assert NOTEBOOKS
    assert all((site / "tutorials" / Path(name).stem / "index.html").exists() for name in NOTEBOOKS)
    data = (site / "results/data.js").read_text()
    tables = json.loads(data.partition(" = ")[2].rstrip(";\n"))
    for table in tables:
        assert table["lines"]
        assert {len(line) for line in table["lines"]} == {len(table["columns"])}
        assert {table["plot"]["x"], table["plot"]["y"], table["plot"]["group"]} <= set(table["columns"])


@pytest.mark.slow
def test_it_works_in_a_browser(address: str, browser: Any) -> None:
    page = browser.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    left_behind = "net::ERR_ABORTED"  # by going on to the next page before its icon was there
    page.on("requestfailed", lambda request: faults.extend([] if request.failure == left_behind else [request.url]))
    page.on(
        "request", lambda request: faults.extend([] if request.url.startswith((address, "data:")) else [request.url])
    )
    page.on("response", lambda answer: faults.extend([] if answer.ok or answer.status == 304 else [answer.url]))

    for path in ("", "getting-started/", "results/retention/", "tutorials/memory_budget/", "reference/functions/"):
        page.goto(f"{address}/{path}")
        assert page.locator("h1").first.is_visible()
        pictures = page.locator("article img").all()
        for picture in pictures:
            if picture.is_visible():
                picture.scroll_into_view_if_needed()
                assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
        if path in ("", "results/retention/"):
            assert any(picture.is_visible() for picture in pictures)

    page.goto(f"{address}/")
    page.locator("input[name=query]").click()
    page.locator("input[name=query]").press_sequentially("convert")
    page.locator(".md-search-result__item").first.wait_for()
    found = page.locator(".md-search-result__item a").evaluate_all("links => links.map(link => link.href)")
    assert any("reference/functions/" in link and link.endswith("#revwire.convert") for link in found)

    explore(page, f"{address}/results/")
    assert not faults


def explore(page: Any, url: str) -> None:
    """The page of results: filter, sort, point at the plot, and the other tables."""
    page.goto(url)
    lines = page.locator("#revwire-results tbody tr")
    dots = page.locator("#revwire-results .dot")
    everything = lines.count()
    assert everything
    assert dots.count()
    dots.first.hover()
    assert "peak MiB" in page.locator("#revwire-results .tip").inner_text()

    page.get_by_role("tab", name="Coverage").click()
    page.get_by_label("filter").fill("swin")
    assert 0 < lines.count() < 353
    assert all("swin" in text.lower() for text in lines.all_inner_texts())
    adds = page.locator("#revwire-results th", has_text="adds")
    adds.click()
    adds.click()
    shown = [int(text.split("\t")[2]) for text in lines.all_inner_texts()]
    assert shown == sorted(shown, reverse=True)
    for name in ("Seconds", "What the function keeps"):
        page.get_by_role("tab", name=name).click()
        assert lines.count()
        assert dots.count()


def test_every_page_of_markdown_is_in_the_site(site: Path) -> None:
    pages = {path.relative_to(DOCS).with_suffix("") for path in DOCS.glob("**/*.md")}
    made = {path.parent.relative_to(site) for path in site.glob("**/index.html")}
    assert {page.parent if page.name == "index" else page for page in pages} <= made
