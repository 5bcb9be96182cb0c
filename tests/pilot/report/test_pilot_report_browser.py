"""The report in a real browser, at the widths of a desk, a phone and a sheet of paper."""

import pytest
from pilot_samples import SAMPLES, saved

from browser import chromium

DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
PAPER = {"width": 680, "height": 1016}  # A4 less its margins, at 96 px an inch
# WCAG 2.1 contrast of every element that has text of its own: [[ratio, needed, text], ...]
CONTRAST = """() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((v, i) => v * a + under[i] * (1 - a));
  const behind = e => {
    const under = e.parentElement ? behind(e.parentElement) : [255, 255, 255];
    return over(parse(getComputedStyle(e).backgroundColor), under);
  };
  const light = rgb => {
    const [r, g, b] = rgb.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  return [...document.body.querySelectorAll('*')].filter(own).map(e => {
    const style = getComputedStyle(e), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const [a, b] = [light(parse(style.color)), light(behind(e))].sort((x, y) => y - x);
    return [(a + .05) / (b + .05), large ? 3 : 4.5, e.textContent.slice(0, 60)];
  });
}"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as launched:
        yield launched


@pytest.fixture
def opened(browser):
    """opened(sample's name, language, size): a page that must stay silent."""
    contexts, heard = [], []

    def page_of(name, language="en", size=DESK):
        contexts.append(browser.new_context(viewport=size))
        page = contexts[-1].new_page()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:"))
                or heard.append(request.url))  # fmt: skip
        page.goto(saved(name, language).html.as_uri())
        return page

    yield page_of
    for context in contexts:
        context.close()
    assert heard == []


def until(page, condition):
    """Wait for it; the page refuses Playwright's own way, which evaluates text."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{condition} did not become true")


@pytest.mark.parametrize(
    ("name", "language", "size"),
    [
        *((name, "en", PHONE) for name in SAMPLES), ("fallback", "ja", PHONE),
        ("fallback", "en", DESK), ("hostile", "en", DESK), ("cannot", "ja", DESK),
    ],
)  # fmt: skip
def test_it_fits_is_silent_and_shows_its_pictures(opened, name, language, size):
    page = opened(name, language, size)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wide = page.eval_on_selector_all(
        "body *", "all => all.filter(e => !e.closest('.scroll') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))",
    )  # fmt: skip
    assert wide == []
    widths = page.eval_on_selector_all("img", "all => all.map(e => [e.complete, e.naturalWidth])")
    assert all(complete and width > 0 for complete, width in widths)
    low = [each for each in page.evaluate(CONTRAST) if each[0] < each[1]]
    assert low == []


@pytest.mark.parametrize("language", ["en", "ja"])
def test_a_phone_s_first_screen_holds_the_recommendation(opened, language):
    page = opened("fallback", language, PHONE)
    box = page.locator(".verdict").bounding_box()
    assert box["y"] + box["height"] <= PHONE["height"]
    assert (
        float(page.eval_on_selector("body", "e => parseFloat(getComputedStyle(e).fontSize)")) >= 16
    )
    # letters of pictures: 11 px of 360, shown at the phone's width
    assert page.locator("figure img").first.bounding_box()["width"] * 11 / 360 >= 10
    # each finding stands beside its budget, on the first screenful of its table
    for finding in page.locator("#quality td:nth-child(2) .finding").all():
        box = finding.bounding_box()
        assert box["x"] + box["width"] <= PHONE["width"]


def test_tables_scroll_in_their_own_box_and_by_keyboard(opened):
    page = opened("fallback", "en", PHONE)
    boxes = page.eval_on_selector_all(
        ".scroll", "all => all.map(e => [e.scrollWidth - e.clientWidth, e.tabIndex])"
    )
    assert max(over for over, _ in boxes) > 50 and {tab for _, tab in boxes} == {0}
    page.locator(".scroll").first.focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowRight")
    until(page, "document.activeElement.scrollLeft > 0")


def test_links_lead_within_the_page_and_to_the_audit(opened):
    page = opened("fallback")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.hash") == "#quality"
    page.keyboard.press("Enter")
    until(page, "scrollY > 300")
    link = page.get_by_role("link", name="open")
    assert link.evaluate("e => e.href").endswith("/audit/03.html")


@pytest.mark.parametrize(
    ("name", "language"),
    [("fallback", "en"), ("fallback", "ja"), ("no_go", "en"), ("cannot", "en")],
)
def test_page_one_fits_one_sheet_and_the_rest_starts_on_the_next(opened, name, language):
    page = opened(name, language, PAPER)
    page.emulate_media(media="print")
    assert page.locator(".first").bounding_box()["height"] <= PAPER["height"]
    assert page.eval_on_selector(".first", "e => getComputedStyle(e).breakAfter") == "page"
    assert not page.locator("nav").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
