"""The report's three files, read without a browser: structure, what is said, hostile texts."""

import json
import re
from html.parser import HTMLParser

import pytest
from pilot_samples import BUDGETS, HOSTILE, SAMPLES, sample, saved

from hashattn.pilot.report import save_report
from hashattn.pilot.report.markdown import escaped

VOID = {"meta", "link", "img", "path", "circle", "rect", "br"}


class Reader(HTMLParser):
    """Elements as (tag, attributes, text inside), visible text, and whether tags close in order."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.visible = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        element = (tag, dict(attributes), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, texts in self.open:
            texts.append(data)
        if not {tag for tag, _, _ in self.open} & {"style", "title", "head"}:
            self.visible.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.visible).split())

    def all(self, *tags):
        return [
            (attributes, " ".join(" ".join(texts).split()))
            for tag, attributes, texts in self.elements
            if tag in tags
        ]


def rendered_markdown(text):
    import mistune

    return mistune.create_markdown(escape=False, plugins=["table", "url", "strikethrough"])(text)


@pytest.mark.parametrize(
    ("name", "language"),
    [*((name, "en") for name in SAMPLES), ("fallback", "ja"), ("cannot", "ja")],
)
def test_the_page_is_whole_and_asks_for_nothing(name, language):
    html = saved(name, language).html.read_text(encoding="ascii")
    page = Reader(html)
    policy = next(a["content"] for a, _ in page.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    assert page.all("script", "iframe", "object", "form", "base", "style")[1:] == []
    for _, attributes, _ in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key == "style"]
        for key in ("src", "href"):
            value = attributes.get(key, "data:,")
            assert re.match(r"data:|#[a-z]+$|audit/03\.html$", value), value
    assert page.all("html")[0][0]["lang"] == language
    assert all(attributes["alt"] for attributes, _ in page.all("img"))
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    named = {a[key] for _, a, _ in page.elements for key in ("aria-labelledby",) if key in a}
    assert named <= set(ids)
    assert {a["href"][1:] for a, _ in page.all("a") if a["href"][0] == "#"} <= set(ids)
    if name != "hostile":
        text = page.text.replace(" ".join(str(list(BUDGETS)).split()), "")  # a setting, in full
        assert not re.search(r"\b(None(?! is)|nan|True|False)\b|\{\w+|[0-9]\.[0-9]{6}", text)


def test_page_one_comes_first_and_says_what_to_do():
    page = Reader(saved("fallback").html.read_text())
    (_, first), *_ = page.all("header")
    assert "Go, with the fallback on" in first and "Budget to use Read 1 of 16 tokens" in first
    assert first.index("fallback on") < first.index("Why") < first.index("What to do next")
    assert "−2 points" in first and "from −8 to +3 points of 100 (40 questions)" in first
    assert "no difference found" in first and "1,200 → 700" in first
    assert "3,100 → 1,800 USD at 2.5 an hour" in first and "+3%" in first
    assert "about 150 sentences in all" in first
    titles = [text for attributes, text in page.all("h2") if "id" in attributes]
    assert titles[1] == "Quality and how much is read" and titles[-1] == "How to run this again"


@pytest.mark.parametrize(
    ("name", "says"),
    [("go", "Go"), ("no_go", "No go"), ("cannot", "Cannot be judged"),
     ("nothing", "Cannot be judged")],
)  # fmt: skip
def test_each_verdict_has_its_word_and_symbol(name, says):
    html = saved(name).html.read_text()
    page = Reader(html)
    assert page.all("p")[1][1] == says
    shapes = {
        key: re.search(r'class="verdict \w+">\s*<svg.*?</svg>', saved(key).html.read_text(), re.S)[
            0
        ]
        for key in ("go", "fallback", "no_go", "cannot")
    }
    assert len({re.sub(r"verdict \w+", "", shape) for shape in shapes.values()}) == 4
    assert re.search(rf"^## \S+ {says}$", saved(name).markdown.read_text(), re.M)


def careless(language):
    """No floor is clear, yet the result calls everything kept and says go."""
    result = sample("cannot", language)
    good = sample("fallback")
    result["recommendation"] = good["recommendation"]
    result["quality"] = good["quality"]
    return result


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("make", [lambda name: sample("cannot", name), careless])
def test_where_no_floor_is_clear_nothing_is_called_kept_or_go(tmp_path, make, language):
    files = save_report(make(language), tmp_path)
    page = Reader(files.html.read_text())
    shown = [page.text, *(a.get("alt", "") + a.get("class", "") for _, a, _ in page.elements)]
    forbidden = r"kept|\blost\b(?! by that)|(?<![a-z])go(?![a-z])|no difference|維持|低下|導入"
    for text in (*shown, files.markdown.read_text()):
        text = text.replace("on top of a KV cache", "")
        assert not re.search(forbidden, text.replace("No difference found", ""), re.I), text
    numbers = json.loads(files.json.read_text())
    assert numbers["recommendation"]["verdict"] == "cannot_be_judged"
    assert not re.search(r'kept|"lost|quality_|fidelity_|"go', files.json.read_text())
    word = {"en": "cannot be judged", "ja": "判定不能"}[language]
    cells = [text for _, text in page.all("td")]
    assert sum(word in cell for cell in cells) >= 2 * 3 * 2  # difference and finding, every row
    assert files.markdown.read_text().count(word) >= 2 * 3 * 2


def test_one_unclear_floor_silences_its_measure_alone(tmp_path):
    result = sample("fallback")
    result["floors"]["questions"]["clear"] = False
    page = Reader(save_report(result, tmp_path).html.read_text())
    questions, quotes, fidelity, *_ = page.all("table")
    assert "kept" not in questions[1] and "lost" not in questions[1]
    assert questions[1].count("cannot be judged") == 6
    assert "kept" in quotes[1] and "kept" in fidelity[1]
    assert len(page.all("figure")) == 4  # not the questions' curve
    (_, first), *_ = page.all("header")
    assert "in answers to your questions cannot be judged" in first
    assert "completed sentences of your documents, from −12 to +4" in first  # the next measure


@pytest.mark.parametrize("language", ["en", "ja"])
def test_cuts_and_lost_answers_stand_beside_every_table_of_quality(language):
    html = saved("fallback", language).html.read_text()
    tables = re.split(r"<h3 ", text_between_headings(html))[1:]
    said = {
        "en": "3 of 12; answers lost by that: 1",
        "ja": "12 件中 3 件。それで失われた答え：1 件",
    }
    assert sum(said[language] in part for part in tables[:4]) == 4  # three measures, the floors


def text_between_headings(html):
    """The page with its character references resolved and all tags but h3 removed."""
    import html as entities

    return entities.unescape(re.sub(r"<(?!h3 )[^>]*>", "", html))


def test_sample_sizes_and_intervals_stand_in_every_row():
    page = Reader(saved("fallback").html.read_text())
    questions = page.all("table")[0][1]
    assert questions.count(" 40") == 3
    for span in ("from −4 to +5", "from −8 to +3", "from −24 to −3"):
        assert span in questions
    assert questions.count("no difference found") == 2
    assert questions.count("lower than full attention") == 1
    assert "equal" not in page.text


def test_times_whose_spans_meet_are_not_told_apart():
    page = Reader(saved("go").html.read_text())
    rows = [text for _, text in page.all("tr") if text.startswith(("1/8", "1/32")) and "×" in text]
    assert "No difference found" in rows[0]  # 46 ms, from 44 to 49, beside 48, from 46 to 52
    assert "1.4× faster" in rows[1]
    slow = Reader(saved("no_go").html.read_text())
    assert "1.2× slower" in slow.text  # 59.5 ms instead of 48.2


def test_the_length_below_which_decoding_stays_dense_is_told():
    page = Reader(saved("no_go").html.read_text())
    rows = [text for _, text in page.all("tr") if "×" in text and text.startswith("1/")]
    told = ["at any length", "below 3,000 tokens", "below 5,200 tokens"]
    assert [row for row, text in zip(rows, told, strict=True) if not row.endswith(text)] == []
    assert "No difference found" in rows[0] and "No difference found" in rows[2]
    assert "gains nothing below 5,200 tokens: at 4,096 tokens decoding stays dense" in page.text


@pytest.mark.parametrize("language", ["en", "ja"])
def test_hostile_texts_are_text(language):
    files = saved("hostile", language)
    page = Reader(files.html.read_text())
    assert "<script>document.title='owned'</script>" in page.text  # as text
    assert "{{ 7*7 }}" in page.text
    assert "⟨U+202E⟩gnp.exe⟨U+202C⟩" in page.text and "\u202e" not in page.text
    assert "⟨U+0000⟩" in page.text and "\0" not in page.text
    assert max(len(text) for _, text in page.all("td", "th", "h1", "dd")) < 700
    assert json.loads(files.json.read_text())["changed"][0]["question"] == HOSTILE
    markdown = files.markdown.read_text(encoding="utf-8")
    assert "\u202e" not in markdown and "\0" not in markdown
    shown = rendered_markdown(markdown)
    assert not re.search(r"<(script|img|iframe|a (?!href=\"audit/03\.html\"))", shown)
    assert shown.count("<a ") == 1
    assert shown.count("<table>") == len(re.findall("^[|] ---", markdown, re.M))
    widths = [line.count("|") - line.count(r"\|") for line in markdown.split("\n")
              if line.startswith("| ")]  # fmt: skip
    assert set(widths) == {3, 4, 5, 6, 7, 9}  # tables of 2, 3, 4, 5, 6 and 8 columns, none split


@pytest.mark.parametrize(
    "text",
    [
        "![a](https://example.org/a.png)", "[a](b)", "[a]: https://example.org", "<b>a</b>",
        "<https://example.org>", "http://example.org", "www.example.org", "a@example.org", "# a",
        "- a", "+ a", "* a", "1. a", "2) a", "> a", "| a | b |", "```", "~~~", "`a`", "**a**",
        "_a_", "~~a~~", "&lt;b&gt;", "---", "===", "    code", "a  \nb", "\\", "<!-- a", "a\\|b",
        "HTTP://example.org", "ftp://example.org",
    ],
)  # fmt: skip
def test_no_text_is_markup_in_markdown(text):
    import html as entities

    from markdown_it import MarkdownIt

    line = escaped(text)
    plain = " ".join(text.split())
    for render in (rendered_markdown, MarkdownIt("commonmark").enable("table").render):
        shown = render(f"{line}\n")
        assert re.findall(r"<[^>]+>", shown) == ["<p>", "</p>"], shown
        assert entities.unescape(shown[3:].rstrip()[:-4]) == plain
        row = render(f"| h | i |\n| --- | --- |\n| {line} | x |\n")
        assert row.count("<td>") == 2 and set(re.findall(r"</?(\w+)", row)) <= {
            "table", "thead", "tbody", "tr", "th", "td",
        }  # fmt: skip


def test_markdown_holds_what_the_page_holds():
    page = Reader(saved("fallback").html.read_text())
    shown = Reader("<div>" + rendered_markdown(saved("fallback").markdown.read_text()) + "</div>")
    for heading in page.all("h1", "h2", "h3"):
        if heading[1] != "In this report":
            assert heading[1] in shown.text
    for _, text in page.all("td"):
        for word in text.split():
            assert word in shown.text
    assert [a for a, _ in shown.all("a")] == [{"href": "audit/03.html"}]


def test_a_skipped_file_is_said_with_its_reason(tmp_path):
    pytest.importorskip("hashattn.pilot.documents.wording")
    result = sample("go", "ja")
    result["documents"]["skipped"] = [
        {"name": "a.pdf", "reason": "It has no text layer.", "key": "no_text_layer", "values": {}}
    ]
    page = Reader(save_report(result, tmp_path).html.read_text())
    assert "OCR" in page.text and "text layer" not in page.text


def test_the_pre_flight_is_said_with_its_quantities(tmp_path):
    wording = pytest.importorskip("hashattn.pilot.capacity.wording")
    result = sample("go")
    units = ("bytes", "share", "times", "tokens", "ms", "us", "devices", "sequences")
    result["preflight"]["lines"] = [
        {"key": key, "value": None if not n else float(n), "unit": units[n % len(units)]}
        for n, key in enumerate(wording.LABELS["en"])
    ]
    page = Reader(save_report(result, tmp_path).html.read_text())
    for label in wording.LABELS["en"].values():
        assert " ".join(label.split()) in page.text


@pytest.mark.parametrize(
    ("language", "said"),
    [
        ("en", ("all keys and values 17 GB 149,785",
                "a hot set of 1/4, in 4 bits 1.4 GB 1,854,490",
                "Reading the 4,096 tokens took 12 s. Once the context is saved, 10 questions over "
                "it cost that once, not each time (120 s).")),
        ("ja", ("すべてのキーとバリュー 17 GB 149,785",
                "1/4 のホットセット、4 ビット 1.4 GB 1,854,490",
                "4,096 トークンの読み込みに 12 秒かかりました。", "毎回読むと 120 秒")),
    ],
)  # fmt: skip
def test_memory_that_may_be_spared_and_a_saved_context_are_counted(language, said, tmp_path):
    page = Reader(save_report(sample("go", language), tmp_path).html.read_text())
    assert [text for text in said if text not in page.text] == []


def test_many_files_are_counted_and_the_first_shown(tmp_path):
    result = sample("go")
    result["documents"]["unused"] = [result["documents"]["scored"][0]] * 500
    page = Reader(save_report(result, tmp_path).html.read_text())
    assert "The first 200 of 506; all are in pilot.json." in page.text
    assert "500 not used" in page.text
