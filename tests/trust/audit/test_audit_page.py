"""The audit's page in a real browser, at the widths of a desk and of a phone."""

import csv
import io
import json
import re
import time
from statistics import median

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from browser import chromium
from hashattn import Budget, HashSelector, HashWeights, attach
from hashattn.selectors.oracle import OracleSelector
from hashattn.trust.audit.evidence import Evidence
from hashattn.trust.audit.listener import Audit
from hashattn.trust.audit.page import page_html, save_page
from hashattn.trust.audit.source import AuditError, Document
from helpers import characters, tiny_model

SIZES = {"desk": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}
INSIDE = "(p => p.scrollWidth <= p.clientWidth)(document.getElementById('prompt'))"
KINDS = ("read", "dense", "missed")
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<!-- <script> ]]> {{ 7*7 }} &lt;b&gt; \n"
    "\u202egnp.exe\u202c \u2066x\u2069 nul \0 bell \a half \ud800 \udfff end \u2028\u00a0\ufeff\r\n"
    "مرحبا שלום 日本語 👩‍👩‍👧\n"
)


@pytest.fixture(scope="module")
def browser():
    with chromium() as launched:
        yield launched


@pytest.fixture
def open_page(browser, tmp_path):
    """open(evidence or file, size, **of the context): a page that must stay silent."""
    contexts, heard = [], []

    def opened(path, size="desk", **settings):
        if isinstance(path, Evidence):
            path = save_page(
                path, tmp_path / f"page{len(contexts)}.html", notes="Notes <b>here</b>"
            )
        context = browser.new_context(viewport=SIZES[size], has_touch=size == "phone", **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or heard.append(
            request.url))  # fmt: skip
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert heard == []


def audited(text, documents=(), new=5, model=None, tokenizer=None, selector=None):
    model, tokenizer = model or tiny_model("llama"), tokenizer or characters()
    audit = Audit(tokenizer, text, documents=documents)
    ids = torch.tensor([audit.source.ids])
    budget = Budget(sink=1, local=3, heavy=6)
    with attach(model, selector or OracleSelector(), budget) as run, run.listen(audit):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
            streamer=audit,
        )  # fmt: skip
    return audit.evidence


@pytest.fixture(scope="module")
def small():
    text = "Alice sees Bob.\nBob sees no one.\n" * 4 + "Who sees Bob?"
    return audited(text, [Document("letter.txt", 16, 100)])


@pytest.fixture(scope="module")
def long_one():
    """8K tokens of documentation, read by the embedded model, an answer of 9."""
    model = AutoModelForCausalLM.from_pretrained("data/embedded").eval()
    tokenizer = AutoTokenizer.from_pretrained("data/embedded")
    with open("data/corpus/python_docs.txt", encoding="utf-8") as file:
        ids = tokenizer(file.read(40_000), add_special_tokens=False).input_ids[:8100]
    text = tokenizer.decode(ids)
    audit = Audit(tokenizer, text)
    ids = torch.tensor([audit.source.ids])
    assert ids.shape[1] > 8000
    weights = HashWeights.load("data/embedded/hash_weights", model)
    with torch.no_grad(), attach(model, HashSelector(weights), Budget(density=1 / 32)) as run:
        cache = model(ids[:, :-1], logits_to_keep=1).past_key_values
        with run.listen(audit):
            model.generate(ids, past_key_values=cache, max_new_tokens=9, do_sample=False,
                           pad_token_id=0, eos_token_id=None, streamer=audit)  # fmt: skip
    return audit.evidence


def masses(evidence, token, kind, layer=None, head=None):
    """What a passage's shade should stand for: the mean over layers and heads."""
    layers = evidence.layers if layer is None else [layer]
    parts = []
    for one in layers:
        found = evidence.layer(token, one).masses[KINDS.index(kind)].astype(float)
        parts += list(found if head is None else found[head : head + 1])
    return np.mean(parts, axis=0)[: len(evidence.source.passages)]


def shades(page):
    """(mass, opacity of the background) of every passage, as the browser shows them."""
    found = page.eval_on_selector_all(
        "#prompt > span",
        "spans => spans.map(s => [Number(s.dataset.mass), getComputedStyle(s).backgroundColor])",
    )
    return [(mass, alpha(color)) for mass, color in found]


def alpha(color):
    numbers = [float(x) for x in re.findall(r"-?[\d.]+(?:e-?\d+)?", color.replace("srgb", ""))]
    return numbers[3] if len(numbers) == 4 else 1.0


def check_shades(page, exact, top):
    shown = shades(page)
    assert [mass for mass, _ in shown] == pytest.approx(exact.tolist(), rel=1e-5, abs=1e-9)
    strength = np.sqrt(np.minimum(1, exact / top))
    assert [a for _, a in shown] == pytest.approx(strength.tolist(), abs=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_shading_is_what_the_evidence_says(open_page, small, size):
    page = open_page(small, size)
    for token, kind, layer, head in [
        (1, "read", None, None),
        (1, "missed", None, None),
        (3, "dense", 1, None),
        (4, "missed", 0, 2),
        (2, "read", None, 3),
    ]:
        page.check(f"input[name=answer] >> nth={token}", force=True)
        page.check(f"input[value={kind}]", force=True)
        page.select_option("#layer", "all" if layer is None else str(small.layers.index(layer)))
        page.select_option("#head", "all" if head is None else str(head))
        top = max(masses(small, token, one, layer, head).max() for one in KINDS)
        check_shades(page, masses(small, token, kind, layer, head), top)
        missed = [m for one in (small.layers if layer is None else [layer])
                  for m in small.layer(token, one).missed]  # fmt: skip
        if head is not None:
            missed = missed[head :: small.layer(token, 0).heads]
        status = page.inner_text("#status")
        assert re.match(rf"Answer token {token + 1}\b", status)
        assert f"{100 * np.mean(missed):.1f} % of attention missed" in status
    assert page.inner_text("#prompt") == small.source.text
    assert page.is_disabled("input[name=answer] >> nth=0")  # answered by the prompt's dense call


def test_the_grid_is_what_each_head_missed_and_filters(open_page, small):
    page = open_page(small)
    boxes = "[...document.querySelectorAll('#grid span')].map(b => getComputedStyle(b).background)"
    page.check("input[name=answer] >> nth=3", force=True)
    exact = [m for layer in small.layers for m in small.layer(3, layer).missed]
    colors = [re.search(r"color\([^)]+\)|rgba?\([^)]+\)", b)[0] for b in page.evaluate(boxes)]
    assert [alpha(color) for color in colors] == pytest.approx(exact, abs=0.01)
    page.locator("#grid span").nth(4 + 2).click()  # the second layer's third head
    chosen = [page.input_value(f"#{name}") for name in ("layer", "head")]
    assert chosen == ["1", "2"]
    top = max(masses(small, 3, kind, 1, 2).max() for kind in KINDS)
    check_shades(page, masses(small, 3, "read", 1, 2), top)
    page.locator("#grid span").nth(4 + 2).click()
    assert page.input_value("#layer") == page.input_value("#head") == "all"


@pytest.mark.parametrize("size", SIZES)
def test_everything_fits_and_can_be_touched(open_page, small, long_one, size):
    for evidence in (small, long_one):
        page = open_page(evidence, size)
        width = SIZES[size]["width"]
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(INSIDE)
        boxes = page.eval_on_selector_all(
            "button, select, summary, .strip label, .segments label",
            "nodes => nodes.map(n => n.getBoundingClientRect()).map(r => [r.width, r.height])",
        )
        shown = [(w, h) for w, h in boxes if w]
        assert len(shown) > 20 and min(h for _, h in shown) >= 43.9 <= min(w for w, _ in shown)
    page.locator(".strip label").last.tap() if size == "phone" else page.locator(
        ".strip label"
    ).last.click()
    assert re.match(rf"Answer token {long_one.tokens[-1] + 1}\b", page.inner_text("#status"))


@pytest.mark.parametrize("size", SIZES)
def test_a_chosen_passage_comes_into_view_with_its_numbers(open_page, long_one, size):
    page = open_page(long_one, size, reduced_motion="reduce")
    button = page.locator("#passages button").nth(4)
    where = button.locator(".where").inner_text()
    button.click()
    in_view = """id => { const r = document.querySelector(id).getBoundingClientRect();
      return r.top >= 0 && r.top < innerHeight; }"""
    assert page.evaluate(in_view, "#prompt .at") and page.evaluate(in_view, "#detail")
    share = float(page.locator("#prompt .at").get_attribute("data-mass"))
    assert page.inner_text("#detail").startswith(f"{where}: read {100 * share:.1f} %")
    page.locator("#map span").nth(0).click()
    assert page.evaluate("document.getElementById('prompt').scrollTop") == 0
    assert page.locator("#prompt .at").get_attribute("data-passage") == "0"
    page.locator("#prompt > span").nth(1).click()
    assert page.locator("#prompt .at").get_attribute("data-passage") == "1"


def test_all_can_be_done_with_a_keyboard(open_page, small):
    page = open_page(small)
    page.keyboard.press("Tab")
    focus = "(document.activeElement.name || document.activeElement.id)"
    assert page.evaluate(focus) == "answer"
    outline = "getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
    assert page.evaluate(outline) == "solid"
    page.keyboard.press("ArrowRight")
    assert re.match(r"Answer token 3\b", page.inner_text("#status"))
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # around, past the one that cannot be chosen
    assert re.match(r"Answer token 5\b", page.inner_text("#status"))
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.is_checked("input[value=missed]")
    top = max(masses(small, 4, kind).max() for kind in KINDS)
    check_shades(page, masses(small, 4, "missed"), top)
    stops = []
    for _ in range(40):
        page.keyboard.press("Tab")
        stops.append(page.evaluate(f"{focus} || document.activeElement.tagName"))
        if stops[-1] == "csv":
            break
    assert [stop for stop in stops if stop != "BUTTON"] == [
        "layer", "head", "prompt", "json", "csv",
    ]  # fmt: skip
    page.focus("#passages button")
    page.keyboard.press("Enter")
    assert page.locator("#prompt .at").count() == 1
    assert "letter.txt" in page.inner_text("#detail") or "prompt" in page.inner_text("#detail")


def test_controls_have_names(open_page, small):
    page = open_page(small)
    for role, name in [("radio", "Answer token 2"), ("radio", "Would have been read"),
                       ("combobox", "Layer"), ("combobox", "Head"), ("radiogroup", "Answer token"),
                       ("button", "Download CSV"), ("region", "The prompt")]:  # fmt: skip
        assert page.get_by_role(role, name=name).count() >= 1, (role, name)
    assert page.get_by_role("status").count() == 1
    assert page.locator("html[lang=en]").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_darkest_shade_can_be_read(open_page, small, scheme):
    page = open_page(small, color_scheme=scheme)
    canvas = """([front, back]) => {
      const c = Object.assign(document.createElement('canvas'), {width: 1, height: 1})
        .getContext('2d', {willReadFrequently: true});
      const light = (colors) => {
        for (const color of colors) { c.fillStyle = color; c.fillRect(0, 0, 1, 1); }
        const part = [...c.getImageData(0, 0, 1, 1).data].slice(0, 3).map(x => x / 255)
          .map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
        return .2126 * part[0] + .7152 * part[1] + .0722 * part[2];
      };
      const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
      return (a + .05) / (b + .05);
    }"""
    style = "(id, name) => getComputedStyle(document.querySelector(id))[name]"
    read = lambda where, name: page.evaluate(f"([a, b]) => ({style})(a, b)", [where, name])  # noqa: E731
    for kind in KINDS:
        page.check(f"input[value={kind}]", force=True)
        back = [read("#prompt", "backgroundColor"), read("#legend span:last-child",
                                                         "backgroundColor")]  # fmt: skip
        assert page.evaluate(canvas, [[read("#prompt", "color")], back]) > 4.5, kind
    for where in ("#facts", "thead th", ".where", "#status"):
        paper = read("body", "backgroundColor")
        assert page.evaluate(canvas, [[read(where, "color")], [paper]]) > 4.5, where


def test_an_8k_token_page_opens_at_once(open_page, long_one, tmp_path):
    path = save_page(long_one, tmp_path / "long.html")
    assert long_one.tokens == list(range(9))  # the prompt's last row was sparse
    assert path.stat().st_size < 3e6
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        page = open_page(path)
        page.wait_for_function("document.querySelectorAll('#passages tbody tr').length > 5")
        times.append(time.perf_counter() - begin)
    assert median(times) < 2, times
    slow = page.evaluate("""() => {
      const times = [], radios = document.querySelectorAll('input[name=answer]');
      for (const radio of radios) { const t = performance.now(); radio.click();
        document.body.offsetHeight; times.push(performance.now() - t); }
      return times.sort((a, b) => a - b)[times.length >> 1];
    }""")
    assert slow < 500  # ms from a choice to the page laid out


@pytest.mark.parametrize("size", SIZES)
def test_hostile_text_is_shown_and_does_nothing(open_page, size, tmp_path):
    text = HOSTILE + 100_000 * "-" + "\n" + "</script>"
    evidence = hostile_evidence(text)
    path = save_page(
        evidence, tmp_path / "h.html", title="<i>x</i>\ud800", notes="</script>\u202e\0 a\r\nb"
    )
    html = path.read_bytes()
    assert html.isascii() and html.count(b"</script>") == 2 and html.count(b"<script") == 2
    page = open_page(path, size)
    assert page.title() == "<i>x</i>\ufffd"
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size]["width"]
    assert page.locator("img, i, #prompt b, iframe").count() == 0
    shown = page.evaluate("document.querySelector('#prompt').textContent")
    assert "</script><script>document.title='owned'" in shown and 100_000 * "-" in shown
    for mark in ("202E", "202C", "2066", "0000", "0007", "D800", "DFFF", "2028", "FEFF"):
        assert f"⟨U+{mark}⟩" in shown
    for hidden in "\u202e\u202c\u2066\u2069\0\a\u2028\ufeff\r":
        assert hidden not in page.evaluate("document.body.textContent")
    # a Windows line end is a line end
    assert "⟨U+000D⟩" not in page.evaluate("document.body.textContent")
    assert page.evaluate(INSIDE)
    for kept in ("مرحبا שלום", "日本語", "👩‍👩‍👧"):
        assert kept in shown
    where = page.evaluate("JSON.parse(document.getElementById('data').textContent).passages")
    assert [p[-2:] for p in where] == [
        [place.prompt_start, place.prompt_end]
        for place in map(evidence.source.place_of_passage, range(len(where)))
    ]


def hostile_evidence(text):
    """Evidence of one dense step over a hostile prompt, with random keys."""
    from hashattn.attention.observer import LayerStep
    from hashattn.selectors.base import KeyView

    tokenizer = AutoTokenizer.from_pretrained("data/embedded")
    audit = Audit(tokenizer, text, documents=[Document("<b>\u202e\ud800.txt", 0, 40)])
    n = len(audit.source.ids) + 1
    generator = torch.Generator().manual_seed(0)
    query, keys = (torch.randn(1, 2, x, 4, generator=generator) for x in (1, n))
    logits = {"scaling": 1.0, "softcap": None, "sinks": None}
    audit.saw(LayerStep(0, query, n, n, "dense_layer", view=KeyView(keys), logits=logits))
    audit.put(torch.tensor([67, 200]))
    return audit.evidence


def test_downloads_are_the_package_s_exports(open_page, small, tmp_path):
    page = open_page(small)
    page.check("input[name=answer] >> nth=2", force=True)
    exact = json.loads(small.save_json(tmp_path / "e.json", tokens=[2]).read_text())
    found = {}
    for kind in ("json", "csv"):
        with page.expect_download() as download:
            page.click(f"#{kind}")
        assert download.value.suggested_filename == f"evidence-token-3.{kind}"
        download.value.save_as(tmp_path / f"down.{kind}")
        found[kind] = (tmp_path / f"down.{kind}").read_text(encoding="utf-8")
    rows = json.loads(found["json"])
    assert (rows["format"], rows["columns"]) == (exact["format"], exact["columns"])
    key = lambda row: [row[name] for name in ("layer", "head", "unit", "prompt_start")]  # noqa: E731
    order = lambda rows: sorted(rows, key=lambda row: [str(x) for x in key(row)])  # noqa: E731
    assert len(rows["rows"]) == len(exact["rows"])
    for one, other in zip(order(rows["rows"]), order(exact["rows"]), strict=True):
        for name, value in one.items():
            close = pytest.approx(other[name], rel=1e-6) if name in KINDS else other[name]
            assert value == close, name
    mine = list(csv.reader(io.StringIO(found["csv"], newline="")))
    theirs = small.save_csv(tmp_path / "e.csv", tokens=[2]).read_text(encoding="utf-8")
    assert mine[0] == next(csv.reader(io.StringIO(theirs)))
    texts = [sorted(row[:3] + row[4:5] + row[6:7] for row in rows[1:])
             for rows in (mine, list(csv.reader(io.StringIO(theirs, newline=""))))]  # fmt: skip
    assert texts[0] == texts[1]


def test_a_page_of_many_heads_shows_their_means(open_page, small, tmp_path):
    path = tmp_path / "means.html"
    path.write_text(page_html(small, "Means", "", limit=100))
    page = open_page(path)
    assert "means over the heads" in page.inner_text("#notices")
    assert page.is_disabled("#head")
    page.check("input[value=dense]", force=True)
    exact = masses(small, 1, "dense")
    top = max(masses(small, 1, kind).max() for kind in KINDS)
    shown = [mass for mass, _ in shades(page)]
    assert shown == pytest.approx(exact.tolist(), rel=2e-3, abs=1e-6) and top > 0
    page.select_option("#layer", "1")
    sums, heads = {}, small.layer(1, 1).heads
    for row in small.rows(tokens=[1], layers=[1]):
        if row["unit"] == "token":
            place = row["position"]
            sums[place] = sums.get(place, 0) + row["dense"] / heads
    place = max(sums, key=sums.get)
    first = page.inner_text("#tokens tbody tr >> nth=0").replace("\n", " ")
    assert f"{100 * sums[place]:.1f} %" in first


def test_pages_of_chosen_layers_and_tokens(open_page, small, tmp_path):
    page = open_page(save_page(small, tmp_path / "few.html", layers=[1], tokens=[2, 4]))
    options = page.eval_on_selector_all("#layer option", "all => all.map(o => o.textContent)")
    assert options == ["all", "1"]
    enabled = page.eval_on_selector_all("input[name=answer]", "all => all.map(o => !o.disabled)")
    assert enabled == [False, False, True, False, True]
    check_shades(page, masses(small, 2, "read", 1),
                 max(masses(small, 2, kind, 1).max() for kind in KINDS))  # fmt: skip


def test_the_page_forbids_what_it_does_not_need(small):
    html = page_html(small, "t", "")
    policy = re.search(r'Security-Policy" content="([^"]+)"', html)[1]
    policy = policy.replace("&#39;", "'")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:|//)", html)


def test_a_page_without_a_step_is_refused(tmp_path):
    evidence = Audit(characters(), "abc").evidence
    with pytest.raises(AuditError, match="no step of this run was audited"):
        save_page(evidence, tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()
