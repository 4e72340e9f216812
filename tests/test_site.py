"""The documentation's site: built as by `make docs`, then read page by page in a browser.

All pages are read without JavaScript, in half of the time. None may have a script of its own, so a few of
them show what the theme's scripts do.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from public import OFFERED

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split()
FLAGS += ["--disable-component-update", "--disable-sync"]
READ = r"""async () => {
  await Promise.all([...document.images].map(x => x.decode().catch(() => {})));
  const prose = [], article = document.querySelector("article");
  const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) if (!walker.currentNode.parentElement.closest("code, pre, script, style")) prose.push(walker.currentNode.data);
  const raw = /\$\$|\\[(\[]|\\frac|\*\*|`|^\s*(Args|Returns|Raises):\s*$|\|\s*:?-{3,}|\]\(|\]\[|^\s*(#{1,6}|:::) /m;
  const strange = [...article.querySelectorAll("*")].filter(x => x instanceof HTMLUnknownElement || x.tagName == "SCRIPT");
  return {
    anchors: [...document.querySelectorAll("[id]")].map(x => x.id),
    links: [...document.querySelectorAll("a[href]")].map(x => x.href),
    images: [...document.images].filter(x => !x.naturalWidth).map(x => x.src),
    raw: [...prose.filter(x => raw.test(x)), ...strange.map(x => x.outerHTML)],
  };
}"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def read_all(page, start):
    """address -> what READ finds there, of every page that links lead to."""
    found, ahead, origin = {}, [start], start.rpartition("/")[0]
    while ahead:
        address = ahead.pop()
        there = page.goto(address, wait_until="domcontentloaded").ok
        found[address] = page.evaluate(READ) if there else {"anchors": [], "links": [], "images": [], "raw": []}
        links = {urldefrag(link).url for link in found[address]["links"] if link.startswith(origin)}
        ahead += sorted(link for link in links - found.keys() - set(ahead) if link.endswith(".html"))
    return found


def faults(found, origin, site):
    """What is wrong with pages, with what they link to, and what no page links to."""
    for address, there in found.items():
        page = address.removeprefix(origin)
        yield from (f"{page}: {image} did not load" for image in there["images"])
        yield from (f"{page}: not rendered: {text.strip()[:80]!r}" for text in there["raw"])
        for link in filter(lambda link: link.startswith(origin), there["links"]):
            target, anchor = urldefrag(link)
            if not (site / unquote(target.removeprefix(origin))).is_file():
                yield f"{page}: no file {target.removeprefix(origin)}"
            elif anchor and unquote(anchor) not in found[target]["anchors"]:
                yield f"{page}: no anchor {link.removeprefix(origin)}"
    unread = {str(file.relative_to(site)) for file in site.rglob("*.html")} - {address.removeprefix(origin) for address in found} - {"404.html"}
    yield from (f"no page links to {page}" for page in unread)


@pytest.mark.slow
def test_the_site(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs-material needs Python 3.11 or newer")
    before = os.times()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    after = os.times()
    print(f"built in {after.children_user - before.children_user:.1f} s of processor time")
    assert built.returncode == 0, built.stderr
    reference = "".join(page.read_text() for page in (tmp_path / "api").glob("*.html"))
    assert not [name for name in OFFERED if f'id="rlkern.{name}"' not in reference]

    if CHROMIUM is None:
        pytest.skip("no browser: on Debian and Ubuntu, apt install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    origin, wrong = f"http://127.0.0.1:{server.server_port}/", []
    here = (origin, "data:", "blob:")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)

        def new_page(**options):
            page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light", **options)
            page.set_default_timeout(300_000)  # of a busy machine
            page.on("console", lambda message: message.type == "error" and wrong.append(f"{page.url}: {message.text}"))
            page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
            page.on("request", lambda request: request.url.startswith(here) or wrong.append(f"{page.url}: asks for {request.url}"))
            return page

        started = time.perf_counter()
        found = read_all(new_page(java_script_enabled=False), f"{origin}index.html")
        print(f"read {len(found)} pages in {time.perf_counter() - started:.1f} s")
        wrong += faults(found, origin, tmp_path)
        click_through(new_page(), origin)
        browser.close()
    server.shutdown()
    assert not wrong, "\n".join(wrong)


def click_through(page, origin):
    """From the home page by the navigation, the search and the switch of the theme."""
    page.goto(origin)
    page.locator(".md-tabs").get_by_role("link", name="API reference").click()
    page.locator(".md-sidebar--primary").get_by_role("link", name="Policy losses").click()
    assert page.url == f"{origin}api/policy_losses.html" and page.locator("h1").inner_text().startswith("Policy losses")
    page.get_by_text("Type to start searching").wait_for(state="attached")  # what is typed before is lost
    page.get_by_placeholder("Search").press_sequentially("lp_reg_loss")  # the search listens to keys
    page.locator(".md-search-result__link", has_text="rlkern.lp_reg_loss").first.click()
    page.wait_for_url("**/api/policy_losses.html?h=*#rlkern.lp_reg_loss")
    scheme = page.locator("body").get_attribute("data-md-color-scheme")
    page.locator("label.md-header__button[for^=__palette]:visible").click()
    assert (scheme, page.locator("body").get_attribute("data-md-color-scheme")) == ("default", "slate")
