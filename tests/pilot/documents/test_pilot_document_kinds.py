"""What stands in a file of each kind stands in its text, in order, in a form to answer from."""

import datetime
import io

import pytest
from document_files import cell, docx, paragraph, pdf, pptx_file, xlsx
from openpyxl import Workbook

from hashattn.pilot.documents import ReadLimits, read_documents
from hashattn.pilot.documents.formats.page import page_lines
from hashattn.pilot.documents.formats.pdf import mended
from hashattn.pilot.documents.formats.reading import Reading
from hashattn.pilot.documents.formats.tables import table_lines


@pytest.fixture
def read(tmp_path):
    """read(name=content, ...): the library of a folder of these files."""

    def reader(limits=None, **files):
        for name, content in files.items():
            path = tmp_path / name.replace("__", ".")
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_documents(tmp_path, limits=limits)

    return reader


def text_of(library):
    (document,) = library.documents
    return document.text


def notes(library):
    return [(skipped.name, skipped.key, dict(skipped.values)) for skipped in library.skipped]


def test_text_and_markdown_stay_as_they_are(read):
    library = read(a__txt="one\r\ntwo  \n\n\n  three\ttab\n", b__md="# Title\n\n- *item*\n")
    assert [(d.name, d.kind, d.text) for d in library.documents] == [
        ("a.txt", "txt", "one\ntwo  \n\n\n  three\ttab"),
        ("b.md", "md", "# Title\n\n- *item*"),
    ]
    assert library.skipped == ()


def test_noise_is_removed_and_nothing_is_normalised(read):
    decomposed = "か\u3099 ﬁ ① Å"
    assert text_of(read(a__txt=f"\ufeffa\0b\x07c {decomposed}\x1b[0m")) == f"abc {decomposed}[0m"


PAGE = """<!DOCTYPE html><html><head><title>no title</title><style>p {color: red}</style>
<script>var a = "no script";</script></head><body>
<!-- no comment --><h1>Terms  of
use</h1><p>First <b>bold</b>, <a href="http://x">link</a>.<br>Second&nbsp;line &amp; more</p>
<noscript>no noscript</noscript><template>no template</template>
<div hidden>no hidden</div><div style="color:red; display: none">no display</div>
<ul><li>one<ul><li>inner</ul><li><p>two</p><p>goes on</p></ul><ol start="3"><li>third<li>fourth</ol>
<table><caption>Prices</caption><tr><th>Item<th>Price<tr><td>Lathe</td><td><p>1,200</p></td></tr>
</table><pre>a  b
  c</pre><ruby>漢字<rp>(</rp><rt>かんじ</rt><rp>)</rp></ruby><p>last<script>no()</script>"""
LINE = "本契約の期間は申し出がない限り三年と"
SHOWN = """# Terms of use
First bold, link.
Second\xa0line & more
- one
  - inner
- two
  goes on
3. third
4. fourth
Prices
Item | Price
Lathe | 1,200
a  b
  c
漢字
last"""


def test_a_page_reads_as_a_browser_shows_it(read):
    assert text_of(read(a__html=PAGE)) == SHOWN


def test_a_table_that_places_things_is_not_one_line():
    page = "<table><tr><td><h2>News</h2><p>a<p>b</td><td><ul><li>x</ul></td></tr></table>"
    assert "\n".join(page_lines(page)).strip() == "## News\na\nb\n- x"


def test_a_page_nested_deeper_than_python_calls_is_read(read):
    assert text_of(read(a__html="<div>" * 20_000 + "deep")) == "deep"


def test_a_word_document(read):
    row = "".join(f"<w:tc>{paragraph(text)}</w:tc>" for text in ("Part", "Price"))
    box = f"<w:txbxContent>{paragraph('boxed')}</w:txbxContent>"
    text_box = f"<w:p><w:r><w:pict>{box}</w:pict></w:r></w:p>"
    body = (
        paragraph("Lease", "Title")
        + paragraph("Term", "Heading2")
        + paragraph("Three years & a day.")
        + paragraph("first", listed=True)
        + paragraph("second", listed=True)
        + f"<w:sdt><w:sdtContent>{paragraph('controlled')}</w:sdtContent></w:sdt>"
        + "<w:p><w:ins><w:r><w:t>inserted</w:t></w:r></w:ins>"
        + "<w:del><w:r><w:delText>deleted</w:delText></w:r></w:del></w:p>"
        + f"<w:tbl><w:tr>{row}</w:tr></w:tbl>"
    )
    assert text_of(read(a__docx=docx(body + text_box))) == (
        "# Lease\n\n## Term\nThree years & a day.\n- first\n- second\ncontrolled\ninserted\n"
        "Part | Price\nboxed"
    )


def test_slides(read):
    slides = [("Plan", ["Goal", "Budget 3 M"], "say hello"), ("次に", ["検討"], "")]
    assert text_of(read(a__pptx=pptx_file(slides))) == (
        "# Plan\nGoal\nBudget 3 M\nsay hello\n\n# 次に\n検討"
    )


def test_a_pdf_page_by_page(read):
    library = read(
        a__pdf=pdf(
            ["The term is three", "years."],
            ["本契約の有効期間は特に申し出のない限り三年間", "とする。"],
        )
    )
    assert (
        text_of(library)
        == "The term is three years.\n本契約の有効期間は特に申し出のない限り三年間とする。"
    )
    assert library.documents[0].encoding is None


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("A notice\r\nis, in all,\r\nlong.\r\nNext", "A notice is, in all, long.\nNext"),
        ("1. one\r\n2. two\r\na) x", "1. one\n2. two\na) x"),
        ("Intro\r\nAll of it", "Intro\nAll of it"),
        ("atten\ufffetion of it", "atten-\ntion of it"),  # nobody knows whether it is at-tention
        (f"目的\r\n{LINE}定める\r\nことにする。", f"目的\n{LINE}定めることにする。"),
        (f"{LINE}1\r\n台に{LINE}45\r\n分とする", f"{LINE}1台に{LINE}45分とする"),
        (f"{LINE}\r\n2. 次に", f"{LINE}\n2. 次に"),
        (f"{LINE}。\r\n次に", f"{LINE}。\n次に"),
        (f"{LINE}\r\n見出し\r\n本文は", f"{LINE}見出し\n本文は"),
        ("品名 旋盤\r\n数量 3台\r\n価格 90円", "品名 旋盤\n数量 3台\n価格 90円"),  # a table
        ("", ""),
    ],
)  # fmt: skip
def test_lines_are_mended_where_it_is_plain(page, text):
    assert mended(page) == text


def test_pages_that_are_pictures_are_counted(read):
    library = read(a__pdf=pdf(["text"], None, None, []))
    assert text_of(library) == "text"
    assert notes(library) == [("a.pdf", "picture_pages", {"count": 2, "of": 4})]


def test_a_csv_row_says_all_by_itself(read):
    assert text_of(read(a__csv='name,price,note\nLathe,"1,200",\n"Mill\nbig",900,old\n')) == (
        "name: Lathe; price: 1,200\nname: Mill big; price: 900; note: old"
    )


@pytest.mark.parametrize(
    "content",
    [
        "a;b\n1,5;x\n2,5;y\n",
        "a\tb\n1,5\tx\n2,5\ty\n",
        'a,b\n"1,5",x\n"2,5",y\n',
        "sep=|\na|b\n1,5|x\n2,5|y",
    ],
)  # fmt: skip
def test_the_delimiter_is_found(read, content):
    assert text_of(read(a__csv=content)) == "a: 1,5; b: x\na: 2,5; b: y"


def test_in_doubt_the_names_decide_and_not_the_comma(read):
    assert text_of(read(a__csv="net, EUR;no\n1,5;7\n2,5;8\n")) == (
        "net, EUR: 1,5; no: 7\nnet, EUR: 2,5; no: 8"
    )


def test_answers_with_bars_do_not_divide_a_row(read):
    content = "question,answers\nq1,a|b\nq2,b|c\nq3,c|d\nq, 4,c|d\n"
    assert text_of(read(a__csv=content)).startswith("question: q1; answers: a|b\n")


def test_one_column_of_sentences_is_not_cut_at_commas(read):
    assert text_of(read(a__csv="remark\nno, thanks\nfine\n")) == "remark\nno, thanks\nfine"


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        ([["Sales"], [], ["month", "sum"], ["Jan", "7"]], ["Sales", "month: Jan; sum: 7"]),
        ([["Jan", "7"], ["Feb", "8"]], ["A: Jan; B: 7", "A: Feb; B: 8"]),  # 7 names no column
        ([["a", "a"], ["1", "2"]], ["A: a; B: a", "A: 1; B: 2"]),
        ([["a", "", "c"], ["1", "2", "3", "4"]], ["a: 1; B: 2; c: 3; D: 4"]),
        ([["x"] * 1 + [""] * 27 + ["2"]], ["A: x; AC: 2"]),
        ([["only", "names"], []], ["only | names"]),
        ([], []),
    ],
)  # fmt: skip
def test_names_of_columns(rows, lines):
    assert list(table_lines(rows)) == lines


def test_a_workbook(read):
    book = Workbook()
    sheet = book.active
    sheet.title = "Orders"
    sheet.append(["date", "item", "number", "share", "done"])
    sheet.append([datetime.datetime(2026, 3, 31), "旋盤", 3, 0.125, True])
    sheet.append([datetime.datetime(2026, 4, 1, 9, 30), "x; y", 0.1 + 0.2, None, False])
    sheet.append([None, None, 123456789012345, None, None])
    sheet["D2"].number_format = "0.0%"
    hidden = book.create_sheet("secret")
    hidden.append(["hidden", "cells"])
    hidden.sheet_state = "hidden"
    book.create_sheet("Stock").append(["only"])
    file = io.BytesIO()
    book.save(file)
    assert text_of(read(a__xlsx=file.getvalue())) == (
        "# Orders\n"
        "date: 2026-03-31; item: 旋盤; number: 3; share: 12.5%; done: TRUE\n"
        "date: 2026-04-01 09:30; item: x; y; number: 0.3; done: FALSE\n"
        "number: 123456789012345\n\n"
        "# Stock\nonly"
    )


def test_formulas_count_by_their_stored_values(read):
    rows = (
        f'<row r="1">{cell("A1", "item")}{cell("B1", "sum")}</row>'
        f'<row r="2">{cell("A2", "Lathe")}{cell("B2", "42", "6*7")}</row>'
        f'<row r="3">{cell("A3", "Mill")}{cell("B3", "", "6*8")}</row>'
    )
    library = read(a__xlsx=xlsx(rows))
    assert text_of(library) == "# Prices\nitem: Lathe; sum: 42\nitem: Mill"
    assert notes(library) == [("a.xlsx", "formulas", {"count": 1})]


def test_a_long_document_is_cut_and_says_so(read):
    library = read(ReadLimits(characters=10), a__txt="0123456789abc", b__txt="0123456789\n")
    assert [d.text for d in library.documents] == ["0123456789"] * 2
    assert notes(library) == [("a.txt", "cut", {"characters": 10})]
    library = read(ReadLimits(characters=13), a__txt="x", b__csv="a,b\n1,2\n3,4\n")
    assert library.documents[1].text == "a: 1; b: 2\na:"


def test_nothing_after_the_limit_is_read():
    pieces = ("", "\nfirst\n", "", "second", "third")

    def endless():
        yield from pieces
        pytest.fail("read on")

    assert Reading(pieces).text(19) == ("first\n\nsecond\nthird", False)
    assert Reading(endless()).text(18) == ("first\n\nsecond\nthir", True)
    assert Reading(["a", "\n"]).text(1) == ("a", False)
