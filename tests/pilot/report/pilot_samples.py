"""Results of pilots as they would be: a go, one that cannot be judged, a no."""

import copy
import json
import tempfile
from functools import cache
from pathlib import Path

from hashattn.pilot.report import ReportFiles, save_report

BUDGETS = (1 / 8, 1 / 16, 1 / 32)
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=https://example.org/x.png onerror=x>"
    "![p](https://example.org/p.png) [l](javascript:alert(1)) <https://example.org> "
    "www.example.org "
    "http://example.org/a a|b `c` ``` {{ 7*7 }} &lt;b&gt; $x$ <!-- \n# heading\n\n- item\n"
    "\u202egnp.exe\u202c \u2066x\u2069 nul \0 bell \a half \ud800 end \u2028\ufeff\r\n"
    "مرحبا שלום 日本語 👩‍👩‍👧 " + "x" * 5000
)


def note(key, **values):
    return {"key": key, "values": values}


def file(name, characters, tokens, kind="docx", cut=False):
    return {"name": name, "kind": kind, "characters": characters, "tokens": tokens, "cut": cut}


def score(dense, sparse, low, high, verdict, more=None, count=40, same=0.85):
    return {
        "dense": dense, "sparse": sparse, "difference": sparse - dense, "low": low, "high": high,
        "count": count, "verdict": verdict, "more": more, "same": same,
    }  # fmt: skip


def fidelity(kl, low, high, agreement, ratio, same, verdict, more=None):
    return {"kl": kl, "kl_low": low, "kl_high": high, "agreement": agreement,
            "perplexity_ratio": ratio, "same_tokens": same, "new_tokens": 32, "documents": 8,
            "verdict": verdict, "more": more}  # fmt: skip


def ms(median):
    return {"median": median, "low": 0.96 * median, "high": 1.07 * median}


def go():
    rows = zip(
        BUDGETS,
        (0.131, 0.068, 0.037),
        (score(0.62, 0.62, -0.04, 0.05, "kept", same=0.925),
         score(0.62, 0.6, -0.08, 0.03, "kept"),
         score(0.62, 0.49, -0.24, -0.03, "lost", same=0.6)),
        (score(0.71, 0.71, -0.03, 0.03, "kept", count=64),
         score(0.71, 0.68, -0.12, 0.04, "open", 150, 64),
         score(0.71, 0.55, -0.26, -0.07, "lost", None, 64, 0.5)),
        (fidelity(0.0011, 0.0006, 0.0019, 0.981, 1.001, 30.2, "kept"),
         fidelity(0.0042, 0.0024, 0.0061, 0.958, 1.003, 28.1, "kept"),
         fidelity(0.031, 0.02, 0.047, 0.897, 1.021, 19.5, "lost")),
        strict=True,
    )  # fmt: skip
    names = ("budget", "density", "questions", "quotes", "fidelity")
    return {
        "format": 1,
        "language": "en",
        "title": "Minato Pumps K.K., manuals and contracts",
        "recommendation": {
            "verdict": "go_with_fallback",
            "budget": 1 / 16,
            "reasons": [
                note("quality_kept", budget=1 / 16, measure="questions", difference=-0.02,
                     low=-0.08, count=40),
                note("quality_open", budget=1 / 16, measure="quotes", difference=-0.03, low=-0.12,
                     count=64, more=150),
                note("fidelity_kept", budget=1 / 16, kl=0.0042, agreement=0.958, documents=8),
                note("preflight_worth", ceiling=2.07, share=0.517, speedup=1.7),
                note("contexts_cut", contexts=3, of=12, answers_lost=1),
            ],
        },
        "made": {
            "date": "2026-11-29", "version": "0.1.0", "code": "5f0c" * 16,
            "model": "SmolLM2-135M-Instruct", "model_sha256": "9ab3" * 16,
            "model_note": "pretrained",
            "machine": {"system": "Linux-6.1-x86_64", "processor": "Intel Xeon 2.20 GHz",
                        "cores": 2, "threads": 2, "memory_gib": 7.8, "gpu": None},
            "settings": {"DOCS": "data/company", "QUESTIONS": "data/company/questions.csv",
                         "MODEL": "auto", "LANGUAGE": "en", "BUDGETS": list(BUDGETS),
                         "CONTEXT": 4096, "BATCH": 8, "PRICE_PER_HOUR": 2.5, "SEED": 0,
                         "tolerance": 0.05, "kl_limit": 0.05},
            "command": "make pilot DOCS=data/company QUESTIONS=data/company/questions.csv",
            "seconds": 431.2,
        },
        "preflight": {
            "verdict": "worth",
            "reasons": [],
            "changes": [],
            "lines": [],
            "memory": [
                {"note": note("held"), "bytes": 17.4e9, "longest_context": 149785},
                {"note": note("held_hot", share="1/4"), "bytes": 4.56e9,
                 "longest_context": 572710},
                {"note": note("held_hot_bits", share="1/4", bits=4), "bytes": 1.41e9,
                 "longest_context": 1854490},
            ],
            "cost": {"gpu_hours_dense": 1234.5, "gpu_hours_sparse": 702.1, "money_dense": 3086.0,
                     "money_sparse": 1755.0, "currency": "USD", "price_per_hour": 2.5,
                     "tokens_per_day": 2_000_000, "days": 30},
        },
        "documents": {
            "scored": [file("manuals/P-200 service manual.docx", 48210, 12044, cut=True),
                       file("契約書/基本取引契約.docx", 9120, 6210),
                       file("minutes/2026-04-12.md", 6120, 1490, "md"),
                       file("logs/line-3.txt", 31200, 9800, "txt", True)],
            "calibration": [file("manuals/P-100.pdf", 38800, 9711, "pdf"),
                            file("minutes/2026-03.md", 5200, 1300, "md")],
            "unused": [],
            "skipped": [{"name": "scans/old.pdf", "reason": "No text layer: OCR it first."},
                        {"name": "contracts/signed.docx", "reason": "Protected by a password."}],
        },
        "cut": {"contexts": 3, "of": 12, "answers_lost": 1},
        "codes": {"method": "transform", "bits": 64, "origin": "calibrated", "mass": 0.93,
                  "mass_of_exact": 0.97, "mass_before": 0.81, "tokens": 30000,
                  "bytes_per_token": 720},
        "floors": {
            "questions": floor(0.62, 0.1, 0.52, 0.31, 0.7, 40),
            "quotes": floor(0.71, 0.22, 0.49, 0.36, 0.6, 64),
            "text": floor(1.31, 2.9, 1.59, 1.4, 1.8, 12),
        },
        "quality": [dict(zip(names, row, strict=True)) for row in rows],
        "latency": {
            "context": 4096, "device": "Intel Xeon 2.20 GHz, 2 threads", "steps": 40,
            "prefill_seconds": 12.3, "dense_ms": ms(48.2),
            "budgets": [{"budget": b, "ms": ms(t), "speedup": 48.2 / t, "dense_below": n}
                        for b, t, n in zip(BUDGETS, (45.9, 37.1, 33.4), (2900, 1800, 1200),
                                           strict=True)],
        },
        "memory": {"kv_bytes_per_token": 23040, "code_bytes_per_token": 720, "context": 4096,
                   "kv_bytes": 23040 * 4096, "code_bytes": 720 * 4096},
        "changed": [
            {"question": "What is the torque of the impeller nut of the P-200?",
             "document": "manuals/P-200 service manual.docx", "expected": ["45 Nm", "45 N·m"],
             "dense": "45 Nm", "sparse": "54 Nm", "dense_right": True, "sparse_right": False,
             "budget": 1 / 16, "audit": "audit/03.html"},
            {"question": "契約の解除にはいつまでに通知が必要ですか。",
             "document": "契約書/基本取引契約.docx", "expected": ["3か月前"],
             "dense": "3か月前までに書面で", "sparse": "3か月前", "dense_right": None,
             "sparse_right": True, "budget": 1 / 16, "audit": None},
        ],
        "monitor": [note("watch_drift"), note("watch_receipt", budget=1 / 16),
                    note("watch_fallback"), note("retrain_when", mass=0.88), note("recheck_when")],
        "private": {"sockets_denied": True, "offline": True},
    }  # fmt: skip


def floor(dense, guess, difference, low, high, count, clear=True):
    return {"dense": dense, "guess": guess, "difference": difference, "low": low, "high": high,
            "count": count, "clear": clear}  # fmt: skip


def plain_go():
    """A go without anything open."""
    result = go()
    result["recommendation"] |= {"verdict": "go", "budget": 1 / 8}
    reasons = result["recommendation"]["reasons"]
    faster = note("faster_here", speedup=1.3, context=4096)
    result["recommendation"]["reasons"] = [reasons[0], reasons[2], reasons[3], faster]
    result["cut"] = {"contexts": 0, "of": 12, "answers_lost": 0}
    return result


def cannot():
    """No floor is clear; as a careless measurement would put it, all budgets keep everything."""
    result = go()
    result["title"] = "A folder of random characters"
    result["made"] |= {"model": "embedded", "model_note": "embedded"}
    result["recommendation"] = {
        "verdict": "cannot_be_judged",
        "budget": None,
        "reasons": [
            note("dense_cannot_answer", measure="questions", dense=0.05, guess=0.05, low=-0.05,
                 count=8),
            note("text_not_predicted", dense=6.1, guess=5.9, count=3),
            note("model_is_embedded"),
        ],
    }  # fmt: skip
    result["floors"] = {
        "questions": floor(0.05, 0.05, 0, -0.05, 0.05, 8, False),
        "quotes": None,
        "text": floor(6.1, 5.9, -0.2, -0.3, 0.1, 3, False),
    }
    for row in result["quality"]:
        row["questions"] = score(0.05, 0.05, 0.0, 0.0, "cannot_be_judged", None, 8, 1.0)
        row["quotes"] = None
        row["fidelity"] |= {"verdict": "cannot_be_judged", "documents": 3}
    result["changed"], result["monitor"] = [], []
    result["preflight"]["cost"] = None
    return result


def no_go():
    """Quality is lost and the pre-flight says no; much was not measured."""
    result = go()
    result["recommendation"] = {
        "verdict": "no_go",
        "budget": None,
        "reasons": [
            note("preflight_no", ceiling=1.04, share=0.036, speedup=1.02),
            note("quality_lost", budget=1 / 8, measure="questions", difference=-0.31, low=-0.46,
                 count=40),
            note("fidelity_open", budget=1 / 8, kl=0.05, kl_high=0.19, documents=8, more=None),
            note("dense_here", dense_below=5200, context=4096),
        ],
    }  # fmt: skip
    for row, sparse in zip(result["quality"], (0.31, 0.2, 0.12), strict=True):
        row["questions"] = score(0.62, sparse, sparse - 0.77, sparse - 0.47, "lost", same=0.3)
        row["quotes"] = None
        row["fidelity"] = fidelity(0.05, 0.0, 0.19, 0.83, 1.2, None, "open")
    result["floors"]["quotes"] = None
    result["preflight"] |= {"verdict": "no", "cost": None}
    result["cut"] = result["codes"] = None
    result["latency"]["budgets"] = [
        {"budget": b, "ms": ms(t), "speedup": 48.2 / t, "dense_below": n}
        for b, t, n in zip(BUDGETS, (48.3, 59.5, 48.4), (None, 3000, 5200), strict=True)
    ]
    result["changed"] = []
    result["private"] = {"sockets_denied": False, "offline": False}
    return result


def hostile():
    """Every text that others wrote is hostile."""
    result = go()
    result["title"] = HOSTILE
    for use in ("scored", "calibration", "skipped"):
        for each in result["documents"][use]:
            each["name"] = HOSTILE
    result["documents"]["skipped"][0]["reason"] = HOSTILE
    for each in result["changed"]:
        each |= {"question": HOSTILE, "document": HOSTILE, "expected": [HOSTILE] * 3,
                 "dense": HOSTILE, "sparse": HOSTILE}  # fmt: skip
    result["made"] |= {"model": HOSTILE, "command": HOSTILE, "settings": {HOSTILE: HOSTILE}}
    result["latency"]["device"] = HOSTILE
    result["preflight"]["cost"]["currency"] = HOSTILE
    return result


def nothing():
    """An empty folder: nothing was measured."""
    result = go()
    result["recommendation"] = {
        "verdict": "cannot_be_judged",
        "budget": None,
        "reasons": [note("nothing_to_judge", measure="text", count=0, least=5)],
    }
    result |= {name: [] for name in ("quality", "changed", "monitor")}
    result |= dict.fromkeys(("codes", "latency", "memory", "cut", "preflight"))
    result["floors"] = dict.fromkeys(result["floors"])
    result["documents"] = {use: [] for use in result["documents"]}
    return result


SAMPLES = {
    "go": plain_go, "fallback": go, "cannot": cannot, "no_go": no_go, "hostile": hostile,
    "nothing": nothing,
}  # fmt: skip


def sample(name, language="en"):
    """A fresh copy, as JSON would give it back."""
    return json.loads(json.dumps(copy.deepcopy(SAMPLES[name]()) | {"language": language}))


_FOLDER = tempfile.TemporaryDirectory(prefix="pilot-report-")


@cache
def saved(name: str, language: str = "en") -> ReportFiles:
    """A sample's report, written once for all tests that only read it."""
    return save_report(sample(name, language), Path(_FOLDER.name) / f"{name}-{language}")
