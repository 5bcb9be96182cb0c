"""Broken and hostile files cost a record each, no more, and the files after them are read."""

import io
import os
import signal
import struct
import time
import zipfile

import pytest
from document_files import cell, docx, paragraph, pdf, pptx_file, xlsx, zipped

from hashattn.pilot.documents import DocumentsError, ReadLimits, read_documents
from hashattn.pilot.documents.reader import Reader
from hashattn.pilot.documents.skipped import Refused

ENTITIES = '<!DOCTYPE d [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>'
HEAD = '<?xml version="1.0"?>'


def why(tmp_path, limits=None, **files):
    """{name: key} of what was not read of these files and a last one, which was."""
    for name, content in files.items():
        (tmp_path / name.replace("__", ".")).write_bytes(content)
    (tmp_path / "zz.txt").write_text("still read")
    library = read_documents(tmp_path, limits=limits)
    assert [document.name for document in library.documents] == ["zz.txt"]
    return {skipped.name: skipped.key for skipped in library.skipped}


def test_pdfs_that_cannot_be_read(tmp_path):
    good = pdf(["some text"] * 20, ["more"])
    assert why(
        tmp_path,
        encrypted__pdf=pdf(["secret"], password="geheim"),
        scan__pdf=pdf(None, None),
        blank__pdf=pdf([]),
        pageless__pdf=pdf(),
        cut__pdf=good[: len(good) // 3],
        junk__pdf=b"%PDF-1.7\n" + bytes(range(256)) * 50,
        empty__pdf=b"",
        text__pdf=b"no PDF at all",
    ) == {
        "encrypted.pdf": "encrypted", "scan.pdf": "no_text_layer", "blank.pdf": "no_text_layer",
        "pageless.pdf": "damaged", "cut.pdf": "damaged", "junk.pdf": "damaged",
        "empty.pdf": "empty", "text.pdf": "damaged",
    }  # fmt: skip


def test_a_pdf_that_asks_for_no_password_is_read(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf(["for all"], password=""))
    assert read_documents(tmp_path).documents[0].text == "for all"


def test_office_files_that_cannot_be_read(tmp_path):
    word, sheet, slides = docx(paragraph("x" * 3000)), xlsx(""), pptx_file([("a", ["b"], "")])
    assert why(
        tmp_path,
        old__docx=bytes.fromhex("d0cf11e0a1b11ae1") + bytes(2000),
        cut__docx=word[: len(word) // 2],
        text__docx=b"no zip",
        other__docx=zipped({"a.txt": "no Word document"}),
        flipped__docx=word[:700] + bytes([word[700] ^ 255]) + word[701:],
        empty__xlsx=sheet,
        broken__xlsx=xlsx("<row r='1'><c>"),
        other__xlsx=word,
        other__pptx=docx(""),
        cut__pptx=slides[:-100],
    ) == {
        "old.docx": "encrypted_office", "cut.docx": "damaged", "text.docx": "damaged",
        "other.docx": "damaged", "flipped.docx": "damaged", "empty.xlsx": "empty",
        "broken.xlsx": "damaged", "other.xlsx": "damaged", "other.pptx": "damaged",
        "cut.pptx": "damaged",
    }  # fmt: skip


def test_files_that_unpack_without_end(tmp_path):
    started = time.monotonic()
    spaces = " " * (40 << 20)
    file = io.BytesIO(pptx_file([("a", ["b"], "")]))
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ppt/media/image.bmp", spaces)
    many = zipped({f"{n}.xml": "" for n in range(10_001)})
    assert why(
        tmp_path,
        ratio__docx=docx(spaces),
        ratio__xlsx=xlsx(spaces),
        ratio__pptx=file.getvalue(),
        parts__docx=many,
    ) == dict.fromkeys(("ratio.docx", "ratio.xlsx", "ratio.pptx", "parts.docx"), "bomb")
    assert time.monotonic() - started < 20


def test_what_unpacks_to_more_than_the_limit(tmp_path):
    noise = os.urandom(1 << 20).hex()  # does not shrink to a tenth
    limits = ReadLimits(unpacked_bytes=1 << 20)
    assert why(tmp_path, limits, a__docx=docx(paragraph(noise))) == {"a.docx": "bomb"}


def test_sizes_that_lie(tmp_path):
    content = docx(paragraph("x" * 5000))
    at = 0
    while (at := content.find(b"PK\x01\x02", at)) >= 0:
        if content[at + 46 :].startswith(b"word/document.xml"):
            content = content[: at + 24] + struct.pack("<I", 10) + content[at + 28 :]
        at += 1
    assert why(tmp_path, a__docx=content) == {"a.docx": "damaged"}


def test_entities_are_refused(tmp_path):
    wide = (f'<?xml version="1.0" encoding="UTF-16"?>{ENTITIES}<a/>').encode("utf-16")
    late = f"{HEAD}<!--{' ' * ((1 << 20) - 30)}--><!DOCTYPE d>"  # over the edge of a chunk
    assert why(
        tmp_path,
        a__docx=docx(paragraph("x"), prolog=HEAD + ENTITIES),
        b__xlsx=xlsx("", prolog=HEAD + ENTITIES),
        c__docx=docx(paragraph("x"), **{"word/other.xml": wide}),
        d__docx=docx(paragraph("x"), prolog=late),
        e__pptx=zipped({"ppt/presentation.xml": HEAD + ENTITIES + "<a>&b;</a>"}),
    ) == dict.fromkeys(("a.docx", "b.xlsx", "c.docx", "d.docx", "e.pptx"), "entities")


def test_a_sheet_that_claims_a_million_rows_ends(tmp_path):
    first, last = cell("A1", "only"), cell("XFD1048576", "far")
    rows = f'<row r="1">{first}</row><row r="1048576">{last}</row>'
    (tmp_path / "a.xlsx").write_bytes(xlsx(rows, claims="A1:A1"))
    library = read_documents(tmp_path)
    assert library.documents[0].text == "# Prices\nonly\nfar"


def test_a_page_that_never_ends_its_tags(tmp_path):
    (tmp_path / "a.html").write_text("<table><tr><td>" * 1000 + "<script>" + "x" * 1000)
    (tmp_path / "b.html").write_text("<b x='" + "<!-- " * 2000)
    (tmp_path / "c.html").write_text("</p></div></table></ul>text</td></tr>")
    library = read_documents(tmp_path)
    assert [document.text for document in library.documents][-1:] == ["text"]


@pytest.fixture
def reader():
    with Reader(ReadLimits(seconds=1, memory_bytes=256 << 20)) as reading:
        yield reading


def asked(reader, content=b"x", kind="txt"):
    """The text of a file, or why it is not read."""
    try:
        return reader.read("document", content, kind)["text"]
    except Refused as refused:
        return refused.key


PLANTED = """
import os, signal, sys, time
class Planted:  # stands for PDFium
    FPDF_ERR_PASSWORD = 4
    class PdfiumError(Exception): pass
    def __getattr__(self, name): return self
    def PdfDocument(self, content):
        {does}
sys.modules["pypdfium2"] = Planted()
"""
DOES = {
    "crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed"),
    "exits": ("os._exit(0)", "crashed"),
    "hangs": ("signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)", "timeout"),
    "computes": ("sum(range(10**11))", "timeout"),  # in C, where no handler of Python would run
    "fills memory": ("bytearray(1 << 31)", "memory"),
    "raises": ("raise KeyError(1)", "damaged"),
    "recurses": ("self.PdfDocument(1)", "damaged"),
    "prints": ("print('{}'); print('{}', file=sys.stderr); os.write(1, b'{}'); 1/0", "damaged"),
    "writes": (f"open({str(__file__ + '.made')!r}, 'w')", "damaged"),
    "connects": ("import socket; socket.create_connection(('127.0.0.1', 9))", "damaged"),
    "starts": ("import subprocess; subprocess.run('true'); os._exit(1)", "damaged"),
    "forks": ("os.fork(); os._exit(1)", "damaged"),
}


@pytest.mark.parametrize(("does", "key"), DOES.values(), ids=DOES)
def test_whatever_a_library_does_the_next_file_is_read(tmp_path, monkeypatch, reader, does, key):
    (tmp_path / "sitecustomize.py").write_text(PLANTED.format(does=does))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert asked(reader) == "x"
    assert asked(reader, pdf(["y"]), "pdf") == key
    assert asked(reader) == "x"
    assert not os.path.exists(__file__ + ".made")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    planted = "import sys\nsys.modules['pypdfium2'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(planted)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.pdf").write_bytes(pdf(["x"]))
    with pytest.raises(DocumentsError, match="files need the package pypdfium2: pip install"):
        read_documents(folder)


def test_no_process_is_left(tmp_path):
    with Reader(ReadLimits()) as reader:
        asked(reader)
        process = reader._process
        assert process.poll() is None
    assert process.poll() == 0
    with Reader(ReadLimits(seconds=1)) as reader:
        asked(reader)
        process = reader._process
        os.kill(process.pid, signal.SIGSTOP)  # it cannot even end
        stopped = time.monotonic()
    assert process.poll() == -signal.SIGKILL and time.monotonic() - stopped < 5


def test_the_process_loads_neither_torch_nor_modules_of_its_folder(tmp_path, monkeypatch):
    (tmp_path / "csv.py").write_text("raise SystemExit('run')")
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    monkeypatch.chdir(tmp_path)
    (document,) = read_documents(".").documents
    assert document.text == "a: 1; b: 2"
    with Reader(ReadLimits()) as reader:
        asked(reader)
        with open(f"/proc/{reader._process.pid}/maps") as maps:
            assert "torch" not in maps.read()


def test_nothing_is_written_anywhere(tmp_path):
    files = {"a.docx": docx(paragraph("x")), "b.pdf": pdf(["x"]), "c.xlsx": xlsx(""), "d.txt": b"x"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path, *tmp_path.rglob("*"))}
    read_documents(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path, *tmp_path.rglob("*"))} == before
