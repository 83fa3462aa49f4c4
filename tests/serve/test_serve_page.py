"""The page in a Chromium, as somebody uses it: eyes, mouse, keyboard, a small screen."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.embed.ids import Ids
from pipeline.serve.app import Site, build_app
from pipeline.serve.collection import Collection
from pipeline.serve.gallery import everything, grouped
from tests.serve.browser import new_page, serving
from tests.serve.conftest import TOKEN
from tests.serve.made import EVIL, Made, encoded

Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any, site: Site) -> Iterator[Open]:
    """Opens the page of a site with the token; whatever its console says fails the test."""
    said: list[str] = []
    closing: list[Any] = []

    def opened(site: Site = site, width: int = 1200, height: int = 800, token: str = TOKEN) -> Any:
        served = serving(build_app(site))
        port = served.__enter__()
        page = new_page(browser, viewport={"width": width, "height": height})
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(f"dialog {dialog.message}"), dialog.accept()))
        closing.extend((lambda: served.__exit__(None, None, None), page.context.close))
        page.goto(f"http://127.0.0.1:{port}/" + f"#token={token}" * bool(token))
        return page

    yield opened
    for close in reversed(closing):
        close()
    assert not said


def seen(page: Any, selector: str) -> None:
    """Waits until an image is there and has pixels."""
    page.wait_for_selector(selector)
    page.wait_for_function(
        "s => [...document.querySelectorAll(s)].every(i => i.complete && i.naturalWidth)",
        arg=selector,
    )


def test_first_view_then_a_click_shows_neighbours_and_looks(open_page: Open) -> None:
    page = open_page()
    seen(page, ".cell img")
    assert page.inner_text("h1") == "60 images"
    assert page.url.endswith("/")  # the token is in no address that may be copied or kept
    page.click(".cell >> nth=4")
    seen(page, "#detail .large")
    seen(page, ".neighbours img")
    seen(page, ".looks img")
    assert page.locator(".neighbours button").count() == 24
    assert page.locator(".looks figure").count() == 2
    name = page.inner_text("#name")
    page.click(".neighbours button >> nth=0")
    page.wait_for_function("n => document.querySelector('#name').textContent !== n", arg=name)
    page.click("#close")
    assert page.locator("#detail").is_hidden()


def test_names_of_strangers_are_shown_as_text(open_page: Open) -> None:
    page = open_page()
    page.select_option("#by", "label")
    page.wait_for_selector(".group-name")
    assert EVIL in page.locator(".group-name b").all_inner_texts()
    page.click(".cell >> nth=0")
    page.wait_for_selector("#detail dd")
    assert EVIL in page.inner_text("#detail dl")


def test_groups_put_like_beside_like(open_page: Open, made: Made) -> None:
    page = open_page()
    for by in ("label", "cluster"):
        page.select_option("#by", by)
        page.wait_for_selector(".group-name")
    count = page.locator("#group option").count()
    page.select_option("#group", str(count - 1))
    last = page.locator(f"#group option >> nth={count - 1}").inner_text().partition(" (")[0]
    page.wait_for_function(
        "n => [...document.querySelectorAll('.group-name b')].some(b => b.textContent === n)",
        arg=last,
    )


def test_keyboard_alone_is_enough(open_page: Open) -> None:
    page = open_page()
    seen(page, ".cell img")
    assert page.evaluate("document.activeElement.id") == "wall"

    def active() -> int:
        return int(page.get_attribute("#wall", "aria-activedescendant").removeprefix("cell-"))

    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert active() == 2
    page.keyboard.press("ArrowDown")
    columns = active() - 2
    assert columns >= 3
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    assert active() == 1
    page.keyboard.press("End")
    assert active() == 59
    assert page.locator("#cell-59").is_visible()
    page.keyboard.press("ArrowRight")
    assert active() == 59
    page.keyboard.press("Home")
    shadow = "getComputedStyle(document.querySelector('.cell.active'), '::after').boxShadow"
    assert page.evaluate(shadow) != "none"  # the focus is seen
    page.keyboard.press("Enter")
    page.wait_for_selector(".neighbours button")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.parentElement.className") == "neighbours"
    page.keyboard.press("ArrowRight")
    name = page.inner_text("#name")
    page.keyboard.press("Enter")
    page.wait_for_function("n => document.querySelector('#name').textContent !== n", arg=name)
    page.keyboard.press("Escape")
    assert page.locator("#detail").is_hidden()
    assert page.evaluate("document.activeElement.id") == "wall"


def test_an_image_of_ones_own_is_searched_with(open_page: Open, made: Made) -> None:
    page = open_page()
    image = made.images[made.ids[8]]
    page.set_input_files("#file", {"name": "mine.png", "mimeType": "image/png", "buffer": image})
    seen(page, "#detail .large")
    seen(page, ".looks img")
    assert page.inner_text("#name") == "mine.png"
    nearest = page.locator(".neighbours button >> nth=0")
    assert nearest.get_attribute("title").startswith(made.sources[8])
    assert nearest.inner_text().startswith("1.000")


DROP = """bytes => {
  const file = new File([new Uint8Array(bytes)], 'dropped.png', {type: 'image/png'});
  const data = new DataTransfer();
  data.items.add(file);
  const send = kind => document.body.dispatchEvent(
    new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
  send('dragenter'); send('dragover');
  const asked = !document.querySelector('#drop').hidden;
  send('drop');
  return asked;
}"""


def test_an_image_is_dropped(open_page: Open) -> None:
    page = open_page()
    page.wait_for_selector(".cell img")
    assert page.evaluate(DROP, list(encoded(2, 99)))
    seen(page, ".neighbours img")
    assert page.inner_text("#name") == "dropped.png"
    assert page.locator("#drop").is_hidden()


def test_a_file_over_the_limit_is_said_before_it_is_sent(open_page: Open) -> None:
    page = open_page()
    page.wait_for_selector(".cell")
    big = {"name": "big.png", "mimeType": "image/png", "buffer": b"x" * 200_001}
    page.set_input_files("#file", big)
    page.wait_for_selector("#message.error")
    assert "200,000 bytes" in page.inner_text("#message")


def test_a_small_screen_has_all_of_it(open_page: Open) -> None:
    page = open_page(width=360, height=740)
    seen(page, ".cell img")
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) == 360
    page.select_option("#by", "label")
    page.wait_for_selector(".group-name")
    assert page.evaluate(wide) == 360
    lefts = page.evaluate(
        "new Set([...document.querySelectorAll('.cell')].map(c => c.style.left)).size"
    )
    assert lefts == 3
    page.click(".cell >> nth=1")
    seen(page, ".neighbours img")
    assert page.evaluate(wide) == 360
    assert page.locator("#detail").bounding_box()["width"] == 360
    buttons = ("#close", "#choose", "#by")
    visible = [one for one in buttons if page.locator(one).is_visible()]
    assert "#close" in visible  # the image covers the others
    for button in visible:
        box = page.locator(button).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360


def test_without_patches_there_is_nothing_to_look_at(open_page: Open, site: Site) -> None:
    model = site.model

    class Flat:
        facts = replace(model.facts, patches=(0, 0), looks=())  # type: ignore[union-attr]
        prepare = staticmethod(model.prepare)  # type: ignore[union-attr]
        embed = staticmethod(model.embed)  # type: ignore[union-attr]

    page = open_page(replace(site, model=Flat()))
    page.click(".cell >> nth=0")
    seen(page, ".neighbours img")
    assert page.locator(".looks").count() == 0


def test_a_hundred_thousand_images_keep_few_in_the_document(open_page: Open, site: Site) -> None:
    page = open_page(replace(site, collection=many(100_000)))
    seen(page, ".cell img")
    assert page.inner_text("h1") == "100,000 images"
    assert page.locator(".cell").count() < 200
    page.keyboard.press("End")
    page.wait_for_selector("#cell-99999 img")
    page.select_option("#by", "parity")
    page.wait_for_selector(".group-name")
    page.select_option("#group", "1")
    page.wait_for_selector("#cell-50000 img")
    assert page.locator(".cell").count() < 200


def many(rows: int) -> Collection:
    """So many images, each of one of nine pictures."""
    pictures = [encoded(i % 3, i, 64) for i in range(9)]
    numbers = np.arange(rows)
    vectors = np.stack([np.cos(numbers), np.sin(numbers)], 1)

    def search(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        products = queries @ vectors.T
        best = np.argsort(-products, axis=1)[:, :k]
        return np.take_along_axis(products, best, 1), best

    groupings = [everything(rows), grouped("parity", ["even", "odd"], numbers % 2, None)]
    return Collection(
        ids=Ids(np.array([f"{i:032x}" for i in numbers], "S32")),
        source=lambda row: f"{row}.png",
        labels=None,
        decisions=None,
        groupings={one.name: one for one in groupings},
        search=search,
        vector=lambda row: vectors[row],
        image=lambda row: pictures[row % 9],
    )


def test_a_wall_higher_than_browsers_scroll_ends_at_its_last_image(
    open_page: Open, site: Site
) -> None:
    page = open_page(replace(site, collection=many(600_000)), width=360, height=740)
    seen(page, ".cell img")
    assert page.evaluate("document.querySelector('#space').offsetHeight") == 8_000_000
    page.evaluate("document.querySelector('#wall').scrollTop = 1e9")
    page.wait_for_selector("#cell-599999 img")
    box = page.locator("#cell-599999").bounding_box()
    assert box["y"] + box["height"] <= 740
    page.keyboard.press("Home")
    page.wait_for_selector("#cell-0 img")


def test_the_page_is_readable_in_the_dark(browser: Any, site: Site) -> None:
    with serving(build_app(site)) as port:
        page = new_page(browser, color_scheme="dark")
        page.goto(f"http://127.0.0.1:{port}/#token={TOKEN}")
        seen(page, ".cell img")
        pixels = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
        assert pixels[:40].mean() < 80
        page.context.close()


def test_without_the_token_the_page_asks_for_it(browser: Any, site: Site) -> None:
    with serving(build_app(site)) as port:
        page = new_page(browser)
        page.goto(f"http://127.0.0.1:{port}/#token=wrong-one")
        page.wait_for_selector("#enter")
        assert page.locator(".cell").count() == 0
        page.fill("#token", "still wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#message.error")
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector(".cell img")
        assert page.locator("#enter").is_hidden()
        page.reload()  # by the cookie
        page.wait_for_selector(".cell img")
        page.context.close()
