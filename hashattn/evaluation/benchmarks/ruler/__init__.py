"""RULER (Hsieh et al., 2024): 13 synthetic long-context tasks, generated at any length.

specs: the published parameters. styles: wordings. retrieval, tracking, counting, answering: one
module a family. sizing: filling a prompt to its length. records: what `evaluate` runs.
"""

from hashattn.evaluation.benchmarks.ruler.haystack import Haystack
from hashattn.evaluation.benchmarks.ruler.records import (
    BENCHMARK,
    load_ruler,
    profile_records,
    ruler_protocol,
    ruler_records,
)
from hashattn.evaluation.benchmarks.ruler.specs import TASKS, RulerError
from hashattn.evaluation.benchmarks.ruler.styles import STYLES

__all__ = [
    "BENCHMARK",
    "STYLES",
    "TASKS",
    "Haystack",
    "RulerError",
    "load_ruler",
    "profile_records",
    "ruler_protocol",
    "ruler_records",
]
