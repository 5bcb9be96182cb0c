"""A folder as people keep it: names, links, pipes, copies, clutter, too much of everything."""

import os
import socket
import unicodedata
from pathlib import Path

import pytest

from hashattn.base.errors import HashAttnError
from hashattn.pilot.documents import DocumentsError, ReadLimits, Skipped, files, read_documents
from hashattn.pilot.documents.wording import SENTENCES


def reasons(library):
    return {skipped.name: (skipped.key, dict(skipped.values)) for skipped in library.skipped}


def names(library):
    return [document.name for document in library.documents]


def test_without_documents_the_error_says_so(tmp_path):
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(DocumentsError, match=r"does not exist: give the path of a folder"):
        read_documents(tmp_path / "none")
    with pytest.raises(DocumentsError, match=r"file.txt is a file: give the path of a folder"):
        read_documents(tmp_path / "file.txt")
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(HashAttnError, match=r"empty holds no files: put documents into it \(csv"):
        read_documents(tmp_path / "empty")


def test_order_is_that_of_names_folder_by_folder(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a b.txt", "Z.md", "a/B.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    library = read_documents(tmp_path)
    assert names(library) == ["Z.md", "a/B.txt", "a/b/c.txt", "a/z.txt", "a b.txt", "b.txt"]
    assert read_documents(f"{tmp_path}/") == library == read_documents(tmp_path)


def test_names_of_all_sorts(tmp_path):
    composed, wide = "契約書ガ.txt", "議事録\u3000三月.txt"
    decomposed = unicodedata.normalize("NFD", "議事録ガ.txt")
    for name in (composed, wide, decomposed, "with space.txt", "new\nline.txt", "back\\slash.txt"):
        (tmp_path / name).write_text(name)
    broken = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    Path(os.fsdecode(broken)).write_text("bytes")
    library = read_documents(tmp_path)
    assert set(names(library)) == {
        composed, wide, decomposed, "with space.txt", "new\\nline.txt", "back\\\\slash.txt",
        "caf\\xe9.txt",
    }  # fmt: skip
    "".join(names(library)).encode()  # all of them can be written
    assert {d.text for d in library.documents} >= {decomposed, "new\nline.txt", "bytes"}


def test_links_are_recorded_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    folder = tmp_path / "docs"
    (folder / "inner").mkdir(parents=True)
    (folder / "real.txt").write_text("real")
    (folder / "inner" / "loop").symlink_to(folder)
    (folder / "up.txt").symlink_to(outside / "secret.txt")
    (folder / "beside.txt").symlink_to("real.txt")
    (folder / "dangling.txt").symlink_to("none")
    (folder / "other").symlink_to(outside)
    (tmp_path / "way in").symlink_to(folder)  # which the user names
    for path in (folder, tmp_path / "way in"):
        library = read_documents(path)
        assert names(library) == ["real.txt"]
        assert reasons(library) == dict.fromkeys(
            ("inner/loop", "up.txt", "beside.txt", "dangling.txt", "other"), ("symlink", {})
        )


def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.txt")  # to open it would wait for a writer
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.txt")
        library = read_documents(tmp_path)
    assert reasons(library) == dict.fromkeys(("pipe.txt", "socket.txt"), ("special", {}))


def test_what_becomes_a_link_or_pipe_is_not_opened_either(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_text("x")
    with pytest.raises(files.Refused, match="special"):
        files.read_file(tmp_path / "pipe", 10)
    with pytest.raises(files.Refused, match="unreadable"):
        files.read_file(tmp_path / "link", 10)


def test_clutter_is_counted_and_unknown_kinds_are_by_suffix(tmp_path):
    for name in (
        ".hidden.txt", ".git/config.txt", "~$lock.docx", "Thumbs.db", "a.PNG", "b.png", "c.zip",
        "old.doc", "LICENSE", "d.Txt",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    library = read_documents(tmp_path)
    assert names(library) == ["LICENSE", "d.Txt"]
    assert reasons(library) == {
        "*.png": ("unknown_suffix", {"count": 2, "suffix": ".png", "kinds": files.KIND_NAMES}),
        "*.zip": ("archive", {"count": 1, "suffix": ".zip"}),
        "*.doc": ("old_format", {"count": 1, "suffix": ".doc", "save_as": "docx"}),
        ".*": ("hidden", {"count": 4}),
    }


def test_copies_are_read_once(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text("same")
    os.link(tmp_path / "a.txt", tmp_path / "d.txt")
    library = read_documents(tmp_path)
    assert names(library) == ["a.txt"]
    assert reasons(library) == dict.fromkeys(
        ("b.txt", "c.md", "d.txt"), ("duplicate", {"of": "a.txt"})
    )


def test_files_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "b.txt").write_text("b")
    opened = os.open

    def refuse(path, *arguments, **options):
        if os.fspath(path).endswith("secret.txt"):
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)  # root may read whatever its mode
    library = read_documents(tmp_path)
    assert names(library) == ["b.txt"]
    assert reasons(library) == {"secret.txt": ("unreadable", {"problem": "Permission denied"})}
    assert "(Permission denied): change its permissions" in library.skipped[0].reason


def test_folders_that_may_not_be_listed(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "b.txt").write_text("b")
    listed = os.scandir

    def refuse(path):
        if path in refused:
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused = [str(tmp_path / "closed")]
    library = read_documents(tmp_path)
    assert names(library) == ["b.txt"] and list(reasons(library)) == ["closed/"]
    refused = [os.path.join(tmp_path, "")]
    with pytest.raises(DocumentsError, match="cannot be listed .Permission denied."):
        read_documents(tmp_path)


def test_too_much_is_not_read_and_counted(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(str(number) * 100)
    library = read_documents(tmp_path, limits=ReadLimits(documents=2))
    assert names(library) == ["0.txt", "1.txt"]
    assert reasons(library) == {"2.txt": ("documents_limit", {"limit": 2, "count": 3})}
    library = read_documents(tmp_path, limits=ReadLimits(total_characters=250))
    assert names(library) == ["0.txt", "1.txt", "2.txt"]
    assert reasons(library) == {"3.txt": ("total_characters", {"limit": 250, "count": 2})}
    library = read_documents(tmp_path, limits=ReadLimits(total_seconds=1e-9))
    assert names(library) == []
    assert reasons(library) == {"0.txt": ("total_seconds", {"seconds": 1e-9, "count": 5})}
    library = read_documents(tmp_path, limits=ReadLimits(files=3))
    assert len(names(library)) == 3 and reasons(library) == {"*": ("files_limit", {"limit": 3})}
    library = read_documents(tmp_path, limits=ReadLimits(file_bytes=99))
    assert {key for key, _ in reasons(library).values()} == {"too_large"}


def test_a_file_of_50_mb_is_skipped_without_reading_it(tmp_path):
    with open(tmp_path / "large.txt", "wb") as file:
        file.truncate(50 << 20)
    library = read_documents(tmp_path)
    assert library.skipped[0].reason == (
        "It is larger than 34 MB: split it, or raise ReadLimits.file_bytes."
    )


def test_one_line_of_a_megabyte_is_read(tmp_path):
    for name in ("a.txt", "b.html", "c.csv"):
        (tmp_path / name).write_text(name + "word " * 200_000)
    library = read_documents(tmp_path)
    assert [len(document.text) > 990_000 for document in library.documents] == [True] * 3


@pytest.mark.parametrize(
    "wrong", [{"documents": 0}, {"seconds": 0}, {"file_bytes": 1.5}, {"memory_bytes": 1 << 20}]
)
def test_limits_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ReadLimits(**wrong)


def fields(template):
    from string import Formatter

    return {name for _, name, _, _ in Formatter().parse(template) if name}


def test_every_reason_can_be_said_in_both_languages():
    english, japanese = SENTENCES["en"], SENTENCES["ja"]
    assert list(english) == list(japanese)
    for key, template in english.items():
        assert fields(template) == fields(japanese[key])
        assert template.endswith(".") and ": " in template  # what is wrong: what to do
    root = Path(files.__file__).parent
    sources = "".join(path.read_text() for path in root.rglob("*.py") if path.name != "wording.py")
    assert [key for key in english if f'"{key}"' not in sources] == []
    skipped = Skipped("a", "duplicate", {"of": "契約.txt"})
    assert skipped.say("ja") == "契約.txt と内容が同じため、そちらだけを使います。対応は不要です。"
    with pytest.raises(ValueError, match="language"):
        skipped.say("fr")
