"""The run of a whole profile: notebooks in order, reused where nothing changed, then the report."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hashattn.base.engines import require_engine
from hashattn.base.errors import HashAttnError
from hashattn.base.files import write_json, write_text
from hashattn.reproduce.access import require_access
from hashattn.reproduce.notebooks.claims import (
    VIOLATED,
    claims_text,
    load_cautions,
    load_claims,
    not_judged,
    tally,
)
from hashattn.reproduce.notebooks.execute import (
    State,
    kernel_environment,
    require_kernel,
    run_notebook,
)
from hashattn.reproduce.notebooks.fingerprint import notebook_fingerprints, shared_fingerprint
from hashattn.reproduce.notebooks.manifest import build_manifest
from hashattn.reproduce.notebooks.outcome import Outcome
from hashattn.reproduce.notebooks.report import render_report
from hashattn.reproduce.profiles import Profile, load_profile, profile_path, repository


class ReproductionError(HashAttnError, RuntimeError):
    """A reproduction cannot start or did not show what it must."""


def find_notebooks(folder: Path | None = None) -> list[Path]:
    """The numbered notebooks (NN_name.ipynb) of `folder`, in order; default: notebooks/.

    Raises ReproductionError if there is none.
    """
    folder = (folder or repository() / "notebooks").resolve()
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    paths = [path for path in paths if not path.name.endswith(".partial.ipynb")]
    if not paths:
        raise ReproductionError(f"no notebook called NN_name.ipynb in {folder}")
    return paths


def reproduce(name: str | None = None, notebooks: Path | None = None) -> Outcome:
    """Run the notebooks of profile `name`; write figures, tables, report and manifest.

    Raises, before any work, AccessError when the model, data or device is missing, EngineError when
    HASHATTN_ENGINE's engine is, and KernelError when this interpreter cannot run notebooks;
    NotebookFailed when a notebook fails; ReproductionError, after the report, when a claim that
    must hold does not or a comparison could not be judged.
    """
    profile = load_profile(name)
    require_engine()
    require_kernel()
    require_access(profile)
    sources = find_notebooks(notebooks)
    results = profile.results
    os.environ.update(kernel_environment(profile, profile_path(name)))
    print(f"profile {profile.name}: {len(sources)} notebooks, results in {results}")
    with only_run(results):
        states = _run_all(profile, sources)
        claims = load_claims(results, list(states))
        outcome = Outcome(profile, states, claims, load_cautions(results, list(states)))
        _write_summary(outcome)
    violated = [c.claim for c in claims if c.verdict == VIOLATED]
    if violated:
        raise ReproductionError(f"did not hold: {'; '.join(violated)}")
    for reason, unjudged in not_judged(claims).items():
        raise ReproductionError(
            f"{len(unjudged)} of {len(claims)} claims could not be judged, "
            f"{unjudged[0].claim!r} first: {reason}. Use tasks that the model can answer, or a "
            "model that can answer them"
        )
    return outcome


def _run_all(profile: Profile, sources: list[Path]) -> dict[str, State]:
    """Run or reuse each notebook, one line each; returns their states in order."""
    results, states = profile.results, {}
    fingerprints = notebook_fingerprints(sources, shared_fingerprint(profile))
    for source in sources:
        fingerprint = fingerprints[source.stem]
        state = State.load(results, source.stem)
        if state and state.still_valid(results, fingerprint):
            print(f"{source.stem}: reused, unchanged since {state.finished}", flush=True)
        else:
            print(f"{source.stem}: running", flush=True)
            state = run_notebook(source, results, fingerprint)
            print(f"{source.stem}: {state.seconds:.0f} s", flush=True)
        states[source.stem] = state
    return states


def _write_summary(outcome: Outcome) -> None:
    """manifest.json, report.html and the table of claims in the terminal."""
    results = outcome.profile.results
    manifest = build_manifest(outcome.profile, outcome.states)
    write_json(results / "manifest.json", manifest)
    write_text(results / "report.html", render_report(outcome, manifest))
    print(f"\n{claims_text(outcome.claims)}\n")
    print(tally(outcome.claims, outcome.profile.model))
    for reason, unjudged in not_judged(outcome.claims).items():
        print(f"{len(unjudged)} not judged: {reason}")
    for text in outcome.cautions:
        print(f"caution: {text}")
    print(f"report: {results / 'report.html'}")


@contextmanager
def only_run(results: Path) -> Iterator[None]:
    """Lock a results folder, while the process lives; ReproductionError if another run has it."""
    results.mkdir(parents=True, exist_ok=True)
    with open(results / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ReproductionError(
                f"another run is writing to {results}: wait for it, or set HASHATTN_RESULTS to "
                "another folder for this one"
            ) from None
        yield


def exit_status(work: Callable[[], object], interrupted: str) -> int:
    """Do a command's work: 0 done, 1 failed (the reason is on stderr), 130 interrupted, which
    stderr then says in these words."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the kernel as Ctrl-C does
    start = time.monotonic()
    try:
        work()
    except HashAttnError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}, run again to resume", file=sys.stderr)
        return 130
    print(f"done in {_elapsed(start)}")
    return 0


def _elapsed(start: float) -> str:
    """Minutes and seconds since `start` (time.monotonic)."""
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
