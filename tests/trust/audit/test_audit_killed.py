"""Evidence that outlives its process, and files that are none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hashattn.trust.audit.evidence import Evidence
from hashattn.trust.audit.frames import Frame, FrameLog, read_frames
from hashattn.trust.audit.page import save_page
from hashattn.trust.audit.source import AuditError
from helpers import full_disk

TESTS = Path(__file__).parents[1]

# decodes without end, telling after each step how many tokens were answered
ENDLESS = """
import sys, torch
from hashattn import Budget, attach
from hashattn.selectors.oracle import OracleSelector
from hashattn.trust.audit.listener import Audit
from helpers import characters, tiny_model

text = "Alice sees Bob.\\nWho sees Bob?"
model, tokenizer = tiny_model("llama"), characters()
audit = Audit(tokenizer, text, file=sys.argv[1])
ids = tokenizer(text, return_tensors="pt").input_ids
with torch.no_grad(), attach(model, OracleSelector(), Budget(heavy=6)) as run, run.listen(audit):
    audit.put(ids)
    out = model(ids)
    for step in range(100000):
        token = out.logits[0, -1:].argmax(-1)
        audit.put(token)
        print(step, flush=True)
        out = model(token[None], past_key_values=out.past_key_values)
"""


def test_a_killed_process_loses_the_step_in_hand_at_most(tmp_path):
    file = tmp_path / "killed.audit"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(file)],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        for line in process.stdout:
            if int(line) == 12:
                break
        time.sleep(0.002)  # somewhere within a step
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    told = int(rest[-1]) if rest else 12  # steps up to this one were complete when it was told
    evidence = Evidence.load(file)
    assert evidence.tokens[: told + 1] == list(range(1, told + 1))
    assert len(evidence.tokens) in (told, told + 1)
    assert sorted(evidence.answer)[: told + 1] == list(range(told + 1))
    assert save_page(evidence, tmp_path / "killed.html").exists()
    content = file.read_bytes()
    for cut in range(1, 40):  # wherever the last write ended
        assert Evidence(content[:-cut]).tokens[: told - 1] == list(range(1, told))


FRAMES = [Frame(b"L", 1, 0, b"one"), Frame(b"T", 2, 5, b""), Frame(b"N", 3, -1, b"three")]


def log_of(path):
    log = FrameLog(path)
    for frame in FRAMES:
        log.append(frame)
    return log


@pytest.mark.parametrize("in_memory", [True, False])
def test_frames_are_read_to_the_last_whole_one(tmp_path, in_memory):
    log = log_of(None if in_memory else tmp_path / "new" / "frames")
    content = log.content()
    assert len(content) == log.size and list(read_frames(content, "x")) == FRAMES
    whole = [len(content) - 5 - 21, len(content) - 1]
    for cut in range(1, 5 + 21 + 1):
        assert list(read_frames(content[:-cut], "x")) == FRAMES[:2], (cut, whole)
    torn = bytearray(content)
    torn[-1] ^= 1  # the last frame has its length and not its content
    assert list(read_frames(bytes(torn), "x")) == FRAMES[:2]
    damaged = bytearray(content)
    damaged[content.index(b"one")] ^= 1
    with pytest.raises(AuditError, match="x is damaged at byte"):
        list(read_frames(bytes(damaged), "x"))


@pytest.mark.parametrize("place", range(21))
def test_a_head_that_changed_is_damage_and_reserved_room_is_the_end(place):
    content = bytearray(log_of(None).content())
    reserved = bytes(content) + bytes(100)
    assert list(read_frames(reserved, "x")) == FRAMES
    second = content.index(b"one") + len(b"one")
    content[second + place] ^= 1
    with pytest.raises(AuditError, match="x is damaged at byte"):
        list(read_frames(bytes(content), "x"))


def test_an_audit_goes_over_no_other_file(tmp_path):
    log_of(tmp_path / "frames")
    with pytest.raises(AuditError, match="exists.*another path"):
        FrameLog(tmp_path / "frames")
    with pytest.raises(AuditError, match="cannot be written"):
        FrameLog(tmp_path / "frames" / "below")


def test_a_full_disk_keeps_what_was_written(tmp_path):
    log = log_of(tmp_path / "frames")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with full_disk(log.size + 40), pytest.raises(AuditError, match="is the disk full"):
        log.append(Frame(b"L", 9, 9, bytes(100)))
    assert list(read_frames((tmp_path / "frames").read_bytes(), "x")) == FRAMES
    log.append(FRAMES[0])
    assert list(read_frames(log.content(), "x")) == [*FRAMES, FRAMES[0]]


@pytest.mark.parametrize("content", [b"", b"hello", b"hashattn audit 2\n"])
def test_a_file_that_is_no_evidence_is_named(tmp_path, content):
    path = tmp_path / "other.txt"
    path.write_bytes(content)
    with pytest.raises(AuditError, match="other.txt is not evidence"):
        Evidence.load(path)
    with pytest.raises(AuditError, match="does not exist"):
        Evidence.load(tmp_path / "absent")


def test_a_log_without_its_header_is_named(tmp_path):
    FrameLog(tmp_path / "begun")
    with pytest.raises(AuditError, match="ends before its header"):
        Evidence.load(tmp_path / "begun")
