"""Whatever a file holds, its reader says what is wrong in an error of its own kind."""

import bz2
import gzip
import json
import lzma
import os

import pytest

from hashattn.base.errors import HashAttnError, HashWeightsError
from hashattn.base.files import FileError, read_json, read_json_lines, read_text, read_yaml
from hashattn.evaluation.benchmarks.longbench_protocol import load_prompts
from hashattn.evaluation.benchmarks.ruler import RulerError, load_ruler
from hashattn.evaluation.benchmarks.ruler.haystack import read_haystack
from hashattn.evaluation.benchmarks.ruler.questions import question_set
from hashattn.evaluation.log import ResultLog, ResultLogError
from hashattn.evaluation.records import RecordError, load_records
from hashattn.hashing import HashWeights
from hashattn.reproduce.access import AccessError, missing_model_files
from hashattn.reproduce.bench.record import load as load_bench
from hashattn.reproduce.notebooks.claims import ClaimError, load_claims
from hashattn.reproduce.notebooks.execute import State
from hashattn.reproduce.notebooks.files import read_or_none
from hashattn.reproduce.notebooks.progress import cells_done
from hashattn.reproduce.profiles import ProfileError, load_profile
from hashattn.reproduce.published.measured import read_records
from hashattn.reproduce.published.table import PaperError, load_paper

JAPANESE = '{"key": "契約書のなかの期限はいつですか"}\n'
ENGLISH = '{"key": "What is the term of this contract?"}\n'
DAMAGED = {
    "Shift_JIS": (JAPANESE.encode("cp932"), "is not UTF-8: it looks like SHIFT_JIS; convert it"),
    "EUC-JP": (JAPANESE.encode("euc_jp"), "is not UTF-8: it looks like EUC-JP"),
    "ISO-2022-JP": (("契約" + JAPANESE).encode("iso2022_jp"), "looks like ISO-2022-JP"),
    "UTF-16": (JAPANESE.encode("utf-16"), "looks like UTF-16: convert it: iconv -f UTF-16"),
    "UTF-16 without a mark": (ENGLISH.encode("utf-16-le"), "looks like UTF-16LE"),
    "UTF-16, big end first": (ENGLISH.encode("utf-16-be"), "looks like UTF-16BE"),
    "UTF-32": (JAPANESE.encode("utf-32"), "looks like UTF-32"),
    "gzip": (gzip.compress(ENGLISH.encode()), "looks like gzip: unpack it first"),
    "bzip2": (bz2.compress(ENGLISH.encode()), "looks like bzip2: unpack it first"),
    "xz": (lzma.compress(ENGLISH.encode()), "looks like xz: unpack it first"),
    "zip": (b"PK\x03\x04rest", "looks like a zip archive"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\n", "looks like PDF"),
    "Latin-1": ('{"key": "Köln"}\n'.encode("latin-1"), "is not UTF-8: convert it"),
    "cut UTF-8": (JAPANESE.encode()[:-5], "is not UTF-8"),
    "NUL bytes": (b'{"key": "a\0b"}\n', "holds NUL bytes"),
}
NESTED = {
    "lists": (b"[" * 100_000 + b"]" * 100_000 + b"\n", "nested too deep"),
    "objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n", "nested too deep"),
}
NO_JSON = {
    "half": (b'{"key": "a', "is not JSON"),
    "two values": (b'{"key": 1} {"key": 2}\n', "is not JSON"),
    "a key twice": (b'{"key": "a", "key": "b"}\n', "key 'key' is given twice"),
    "digits": (b'{"key": ' + b"9" * 10_000 + b"}\n", "is not JSON"),
}


def named(cases):
    return [pytest.param(*case, id=name) for name, case in cases.items()]


def log_rows(path):
    with ResultLog(path) as log:
        return log.rows


def weights_card(path):
    path.rename(path.parent / "hash_config.json")
    return HashWeights.load(path.parent)


def weights_index(path):
    path.rename(path.parent / "model.safetensors.index.json")
    return missing_model_files(path.parent)


def prompts(path):
    path.rename(path.parent / "dataset2prompt.json")
    return load_prompts(path.parent)


def claims(path):
    (path.parent / "claims").mkdir()
    path.rename(path.parent / "claims" / "01.json")
    return load_claims(path.parent, ["01"])


def profile(path):
    path = path.rename(path.with_suffix(".yaml"))
    return load_profile(str(path))


READERS = {  # how a user's file is read, and the error that it may end in
    "records": (load_records, RecordError),
    "official samples": (lambda path: load_ruler(path, "vt"), RulerError),
    "haystack": (lambda path: read_haystack(path.rename(path.with_suffix(".json"))), RulerError),
    "questions": (lambda path: question_set("squad", str(path)), RulerError),
    "prompts": (prompts, RecordError),
    "profile": (profile, ProfileError),
    "card": (weights_card, HashWeightsError),
    "index of weights": (weights_index, AccessError),
    "claims": (claims, ClaimError),
    "results beside the paper": (read_records, PaperError),
    "paper": (load_paper, PaperError),
    "bench": (load_bench, FileError),
}


@pytest.mark.parametrize(("content", "message"), named(DAMAGED))
@pytest.mark.parametrize(("read", "error"), [pytest.param(*r, id=n) for n, r in READERS.items()])
def test_what_is_no_utf_8_is_named_by_every_reader(tmp_path, read, error, content, message):
    path = tmp_path / "file.jsonl"
    path.write_bytes(content if content.endswith(b"\n") else content + b"\n")
    with pytest.raises(error, match=message) as raised:
        read(path)
    assert isinstance(raised.value, HashAttnError) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(("content", "message"), named(NESTED))
@pytest.mark.parametrize(
    ("read", "error"), [pytest.param(*r, id=n) for n, r in READERS.items() if n != "paper"]
)
def test_deep_brackets_are_refused_by_every_reader(tmp_path, read, error, content, message):
    path = tmp_path / "file.jsonl"
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        read(path)


@pytest.mark.parametrize(("content", "message"), named(DAMAGED | NESTED | NO_JSON))
def test_a_log_of_something_else_is_left_as_it_is(tmp_path, content, message):
    path = tmp_path / "results.jsonl"
    whole = content if content.endswith(b"\n") else content + b"\n"
    path.write_bytes(whole)
    with pytest.raises(ResultLogError, match=message):
        log_rows(path)
    assert path.read_bytes() == whole and not path.with_name("results.jsonl.damaged").exists()


@pytest.mark.parametrize(("content", "message"), named(NO_JSON))
def test_what_is_no_json_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'{"fine": 1}\n\n' + content)
    with pytest.raises(FileError, match=f"file.jsonl:3 .*{message}"):
        list(read_json_lines(path))
    path.write_bytes(content)
    with pytest.raises(FileError, match=message):
        read_json(path)


@pytest.mark.parametrize(
    "read", [read_text, read_json, read_yaml, lambda p: list(read_json_lines(p))]
)
def test_paths_that_hold_no_file_are_refused(tmp_path, read):
    with pytest.raises(FileError, match="none does not exist"):
        read(tmp_path / "none")
    with pytest.raises(FileError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(FileError, match="cannot be read"):
        read("nul\0byte")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(FileError, match="cannot be read"):
        read(tmp_path / "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_refused(tmp_path):
    path = tmp_path / "closed"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(FileError, match="cannot be read"):
        read_json(path)


def test_files_of_windows_are_read(tmp_path):
    record = {"input": "いつ?", "context": "期限は\n三月", "answers": ["三月"]}
    path = tmp_path / "set.jsonl"
    line = json.dumps(record, ensure_ascii=False)
    path.write_bytes(f"\ufeff{line}\r\n\r\n{line}\r\n".encode())
    assert [r.context for r in load_records(path)] == ["期限は\n三月"] * 2
    tiny = (
        load_profile("tiny").hash_weights_path.parents[1] / "profiles" / "tiny.yaml"
    ).read_text()
    path = tmp_path / "tiny.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + tiny.replace("\n", "\r\n").encode())
    assert load_profile(str(path)) == load_profile("tiny")
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"key": "a"}\r\n{"key": "b"}\r\n')
    with ResultLog(path) as log:
        log.append({"key": "c"})
        assert [*log.rows] == ["a", "b", "c"]
    path = tmp_path / "text"
    path.write_bytes("\ufeffeins\r\nzwei\rdrei\n".encode())
    assert read_text(path) == "eins\nzwei\ndrei\n"


def test_a_bad_byte_is_found_on_its_line(tmp_path):
    path = tmp_path / "set.jsonl"
    line = json.dumps({"input": "a", "context": "b", "answers": ["c"]}).encode() + b"\n"
    path.write_bytes(line * 2 + JAPANESE.encode("cp932"))
    with pytest.raises(RecordError, match=r"set.jsonl:3 is not UTF-8: it looks like SHIFT_JIS"):
        load_records(path)
    assert len(load_records(path, limit=2)) == 2
    with pytest.raises(FileError, match=r"set.jsonl, line 3, is not UTF-8"):
        read_text(path)


@pytest.mark.parametrize(("content", "message"), named(DAMAGED | NESTED | NO_JSON))
def test_damaged_records_of_a_run_are_like_none(tmp_path, content, message):
    """What a killed run left of its own state is made again."""
    (tmp_path / "state").mkdir()
    path = tmp_path / "state" / "01.json"
    for damaged in (content, b"[1]", b'{"fingerprint": "a"}', b"5"):
        path.write_bytes(damaged)
        assert State.load(tmp_path, "01") is None
    path.write_bytes(content)
    assert read_or_none(path) is None and cells_done(path) == ""
    assert read_or_none(tmp_path) is None and read_or_none(tmp_path / "none") is None


@pytest.mark.parametrize("content", ["5", "[5]", '[{"claim": "x"}]', '[{"ours": "many"}]'])
def test_claims_of_another_form_are_refused(tmp_path, content):
    path = tmp_path / "01.json"
    path.write_text(content)
    with pytest.raises(ClaimError, match="01.json is damaged .* delete it with state/01.json"):
        claims(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 5}, "context = 5: must be a text"),
        ({"input": None}, "input = None: must be a text"),
        ({"answers": [5]}, r"answers = \[5\]: must be a list of texts"),
        ({"answers": "A"}, "answers = 'A': must be a list of texts"),
        ({"answers": {"a": 1}}, "answers = .* must be a list of texts"),
        ({"answers": []}, r"answers = \(\): must be at least one text"),
        ({"answers": None}, "answers = None: must be a list of texts"),
        ({"dataset": 7}, "dataset = 7: must be a text"),
        ({"language": ["en"]}, r"language = \['en'\]: must be a text"),
        ({"_id": 3}, "_id = 3: must be a text"),
        ({"length": "x"}, "length = 'x': must be an integer"),
        ({"length": True}, "length = True: must be an integer"),
        ({"length": 1.5}, "length = 1.5: must be an integer"),
        ({"length": -1}, "length = -1: must be an integer"),
        ({"all_classes": "ab"}, "all_classes = 'ab': must be a list of texts, or null"),
        ({"all_classes": [None]}, "all_classes = .* must be a list of texts, or null"),
        ({"context": "\ud800"}, "context = .* must be a text"),
    ],
)
def test_records_say_which_field_is_wrong(tmp_path, change, message):
    record = {"input": "a", "context": "b", "answers": ["c"]}
    path = tmp_path / "set.jsonl"
    path.write_text(f"{json.dumps(record)}\n{json.dumps(record | change)}\n")
    with pytest.raises(RecordError, match=f"set.jsonl:2: {message}"):
        load_records(path)


@pytest.mark.parametrize("line", ["5", '"text"', "[1]", "null"])
def test_lines_that_are_no_objects_are_no_records(tmp_path, line):
    path = tmp_path / "set.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(RecordError, match="set.jsonl:1: record = .* must be a JSON object"):
        load_records(path)
    with pytest.raises(RulerError, match="set.jsonl:1: no field 'input'"):
        load_ruler(path, "vt")


def test_official_samples_say_which_field_is_wrong(tmp_path):
    path = tmp_path / "set.jsonl"
    for sample, message in (
        ({"input": 5, "outputs": ["a"]}, "input = 5: must be a text"),
        ({"input": "a\nb", "outputs": [5]}, r"answers = \[5\]: must be a list"),
        ({"input": "a\nb", "outputs": ["a"], "answer_prefix": None}, "answer_prefix = None"),
    ):
        path.write_text(json.dumps(sample) + "\n")
        with pytest.raises(RulerError, match=f"set.jsonl:1: {message}"):
            load_ruler(path, "vt")
