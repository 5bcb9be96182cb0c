"""Text in the encodings of a company's files, long and short, in one folder."""

import pytest

from hashattn.pilot.documents import read_documents
from hashattn.pilot.documents.formats.text import decoded
from hashattn.pilot.documents.skipped import Refused

TEXTS = {
    "contract": "本契約の有効期間は2026年3月31日までとし、"
    "期間満了の1か月前までに申し出がない限り更新される。",
    "short": "期限はいつですか",
    "kanji": "品番,数量\n旋盤,12\n",
    "half-width": "ｱｲｳｴ 品番ﾃﾞｰﾀ 1200円です",
    "mostly English": "Model: LX-200 lathe\nSpindle speed: 2000 rpm\n備考: なし\n" * 20,
    "German": "Die Kündigungsfrist beträgt drei Monate; Änderungen bedürfen der Schriftform.",
    "quotes": "The “quoted” price — £5 — isn’t binding. It’s a café.",
    "Polish": "Umowa zostaje zawarta na czas określony trzech lat. Zażółć gęślą jaźń.",
    "Chinese": "合同期限为三年，自签署之日起生效。",
    "Taiwanese": "合約期限為三年，自簽署之日起生效。",
    "Korean": "계약 기간은 삼 년이며 서명일로부터 시작한다.",
    "Russian": "Срок действия договора составляет три года.",
    "English": "Nothing but ASCII.",
}
CASES = [
    *((name, codec) for name in TEXTS for codec in ("utf-8", "utf-8-sig", "utf-16", "utf-32")),
    *((name, "cp932") for name in ("contract", "short", "kanji", "half-width", "mostly English")),
    *((name, "euc_jp") for name in ("contract", "short", "kanji", "mostly English")),
    *((name, "iso2022_jp") for name in ("contract", "short", "mostly English")),
    ("German", "cp1252"), ("quotes", "cp1252"), ("Polish", "cp1250"), ("Chinese", "gb18030"),
    ("Taiwanese", "big5"), ("Korean", "cp949"), ("Russian", "cp1251"), ("Russian", "koi8_r"),
    ("English", "utf-16-le"), ("English", "utf-16-be"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "codec"), CASES)
@pytest.mark.parametrize("times", [1, 30])
def test_a_text_comes_back(name, codec, times):
    text = TEXTS[name] * times
    found, encoding, notes = decoded(text.encode(codec))
    assert found == text and notes == []
    if codec in ("cp932", "euc_jp", "cp1252", "cp1251"):  # others have synonyms
        assert encoding == codec


def test_encodings_are_mixed_in_one_folder(tmp_path):
    for name, codec in (("1", "cp932"), ("2", "euc_jp"), ("3", "utf-16"), ("4", "utf-8")):
        (tmp_path / f"{name}.txt").write_bytes(TEXTS["contract"].encode(codec))
    (tmp_path / "5.csv").write_bytes("品名,価格\n旋盤,1200円\n".encode("cp932"))
    library = read_documents(tmp_path)
    assert [document.encoding for document in library.documents] == (
        ["cp932", "euc_jp", "utf-16", "utf-8", "cp932"]
    )
    assert {document.text for document in library.documents[:4]} == {TEXTS["contract"]}
    assert library.documents[4].text == "品名: 旋盤; 価格: 1200円"
    assert library.skipped == ()


def page(head, codec):
    return f"<html><head>{head}</head><body><p>{TEXTS['short']} é</body></html>".encode(
        codec, "ignore"
    )


@pytest.mark.parametrize(
    ("head", "codec"),
    [
        ('<meta charset="Shift_JIS">', "cp932"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=EUC-JP">', "euc_jp"),
        ('<meta charset="no such thing">', "cp932"),
        ('<meta charset="Shift_JIS">', "utf-8"),  # it lies
        ("", "euc_jp"),
    ],
)
def test_a_page_is_read_by_what_it_says_or_else_what_it_is(tmp_path, head, codec):
    (tmp_path / "a.html").write_bytes(page(head, codec))
    (document,) = read_documents(tmp_path).documents
    assert document.text.startswith(TEXTS["short"])


def test_a_page_in_an_encoding_that_cannot_be_guessed(tmp_path):
    head = '<meta charset="iso-8859-2"><p>'
    (tmp_path / "a.html").write_bytes((head + TEXTS["Polish"]).encode("iso8859_2"))
    (document,) = read_documents(tmp_path).documents
    assert document.text == TEXTS["Polish"]


def test_damaged_text_keeps_its_encoding():
    content = TEXTS["contract"].encode() * 3
    text, encoding, notes = decoded(content[:-1])  # a log that was cut within a character
    assert encoding == "utf-8" and text[:-1] == (TEXTS["contract"] * 3)[:-1]
    assert notes == [("damaged_text", {"count": 1})]
    text, encoding, notes = decoded(TEXTS["contract"].encode("utf-16")[:-1])
    assert (encoding, text[:-1], len(notes)) == ("utf-16", TEXTS["contract"][:-1], 1)


def test_a_log_padded_with_nul_is_text():
    assert decoded(b"start\n" + b"\0" * 5000 + b"end\n")[0].replace("\0", "") == "start\nend\n"


@pytest.mark.parametrize(
    "content",
    [
        b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 40,
        b"\x89PNG\r\n\x1a\n" + bytes(range(255, -1, -1)) * 40,
        bytes(range(1, 32)) * 40 + b"of ASCII alone",
        b"%PDF-1.7 named wrongly",
        b"PK\x03\x04 named wrongly",
    ],
)
def test_binary_data_is_no_text(content):
    with pytest.raises(Refused) as caught:
        decoded(content)
    assert caught.value.key == "not_text"
