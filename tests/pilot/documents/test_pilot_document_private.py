"""Reading asks nobody for anything: no connection by any library, whatever a file asks for."""

import socket
import threading

import pytest
from document_files import R, cell, docx, paragraph, pdf, pptx_file, relationships, xlsx, zipped

from hashattn.pilot.documents import read_documents, read_questions

ENDS = """
import os, socket
def end(*arguments, **options):
    os._exit(7)  # which nothing catches
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = end
socket.create_connection = socket.gethostbyname = end
"""


@pytest.fixture
def server():
    """(address, connections so far) of a server on this machine that files name."""
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                heard.append(connection.recv(1000))
                connection.close()

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", heard
        listening.shutdown(socket.SHUT_RDWR)


def files(address):
    """A file of each kind; those that can, ask for something at the address."""
    picture = (
        '<w:p><w:r><w:drawing><a:blip xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/'
        f'main" xmlns:r="{R}" r:link="r2"/></w:drawing></w:r></w:p>'
    )
    linked = relationships(("styles", "styles.xml"), ("numbering", "numbering.xml"))
    linked = linked.replace(
        "</Relationships>",
        f'<Relationship Id="r2" Type="{R}/image" Target="{address}/picture" TargetMode="External"/>'
        f'<Relationship Id="r3" Type="{R}/attachedTemplate" Target="{address}/template" '
        'TargetMode="External"/></Relationships>',
    )
    entity = f'<!DOCTYPE d [<!ENTITY x SYSTEM "{address}/entity">]>'
    uri = f"<< /Type /Catalog /Pages 2 0 R /OpenAction << /S /URI /URI ({address}/pdf) >> >>"
    return {
        "a.txt": b"text", "b.md": f"![x]({address}/md) text".encode(), "c.csv": b"a,b\n1,2\n",
        "d.html": f'<link rel="stylesheet" href="{address}/css"><img src="{address}/img">'
        f'<script src="{address}/js"></script><iframe src="{address}/frame"></iframe>text'.encode(),
        "e.pdf": pdf(["text"]).replace(b"<< /Type /Catalog /Pages 2 0 R >>", uri.encode()),
        "f.docx": docx(paragraph("text") + picture, **{"word/_rels/document.xml.rels": linked}),
        "g.xlsx": xlsx(f'<row r="1">{cell("A1", "1", f"WEBSERVICE({address})")}</row>'),
        "h.pptx": pptx_file([("text", [], "")]),
        "x.docx": docx(paragraph("&x;"), prolog=entity),
        "y.xlsx": xlsx("", prolog=entity),
        "z.docx": zipped({"word/document.xml": f"{entity}<a>&x;</a>"}),
    }  # fmt: skip


def test_no_library_connects_and_no_file_makes_it(tmp_path, monkeypatch, server):
    address, heard = server
    folder, site = tmp_path / "docs", tmp_path / "site"
    folder.mkdir()
    site.mkdir()
    (site / "sitecustomize.py").write_text(ENDS)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setattr(socket.socket, "connect", pytest.fail)  # in this process
    for name, content in files(address).items():
        (folder / name).write_bytes(content)
    library = read_documents(folder)
    assert [document.name[0] for document in library.documents] == list("abcdefgh")
    assert {document.kind for document in library.documents} == (
        {"txt", "md", "csv", "html", "pdf", "docx", "xlsx", "pptx"}
    )
    assert {(skipped.name, skipped.key) for skipped in library.skipped} == (
        {(name, "entities") for name in ("x.docx", "y.xlsx", "z.docx")}
    )
    (tmp_path / "q.csv").write_text("question\nwhat\n")
    assert len(read_questions(tmp_path / "q.csv", library)) == 1
    assert heard == []
