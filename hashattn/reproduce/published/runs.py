"""Which profile's run measures a published number of the paper, or why none does yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hashattn.reproduce.access import is_hub_id
from hashattn.reproduce.profiles import load_profile
from hashattn.reproduce.published.table import PaperError

if TYPE_CHECKING:
    import pandas as pd

FULL = "full attention"
# the paper's name of a method: our names, the one with the same recipe first
OUR_METHODS: dict[str, tuple[str, ...]] = {
    FULL: ("dense",),
    "HashAttention": ("hash_official", "hash"),
    "oracle top-k": ("oracle",),
    "Double Sparsity": ("double_sparsity",),
    "Quest": ("quest",),
    "StreamingLLM": ("streaming_llm",),
    "H2O": ("h2o",),
    "InfLLM": ("infllm",),
    "LSH": ("lsh",),
    "Loki": ("loki",),
    "MagicPIG": ("magicpig",),
    "SnapKV": ("snapkv",),
    "HATA": ("hata",),
}
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


@dataclass(frozen=True)
class Run:
    """How rows of paper.csv are measured with this package.

    rows: {column: value}, which a row must all have. profile: whose records hold the scores, None
    if no profile can measure them, with the reason. claim: (notebook, claim) that measures a
    number that is not a score. Raises PaperError unless there is either a profile or a reason.
    """

    rows: Mapping[str, str]
    profile: str | None = None
    reason: str = ""
    claim: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if (self.profile is None) != bool(self.reason):
            raise PaperError(f"a run of {dict(self.rows)} needs either a profile or a reason")

    def measures(self, row: pd.Series) -> bool:
        """Whether this run measures `row`."""
        return all(row[column] == value for column, value in self.rows.items())


AUTHORS, OWN_BOOK = "llama-3.1-8b-authors", "llama-3.1-8b-longbench-e"
_RULER_32K = "llama-3.1-8b-ruler"
_SKYLIGHT = {"table": "Skylight leaderboard", "model": LLAMA}
RUNS = (  # the first that measures a row counts
    Run({"table": "Table 2"}, AUTHORS),
    Run({"table": "abstract of the first version", "metric": "difference"}, AUTHORS),
    Run({"table": "HATA LongBench-E", "method": FULL, "model": LLAMA}, OWN_BOOK),
    Run({"table": "Table 8"}, "llama-3.1-8b",
        claim=("02_recall", "LSH bits needed to match the learned bits' recall@32")),
    Run({"table": "Table 1"}, reason="no profile yet: which dataset of each category it averages "
        "is not known, and profiles give budgets as densities, not as 512 tokens"),
    Run({"table": "Table 5"}, reason="no profile yet: its budget is not known"),
    Run({"table": "HATA LongBench-E"}, reason="no profile yet: a budget in tokens, two dense "
        "layers, and Llama-2 for some rows"),
    Run(_SKYLIGHT | {"method": FULL}, _RULER_32K),
    Run(_SKYLIGHT | {"method": "HashAttention"}, _RULER_32K),
    Run(_SKYLIGHT | {"method": "oracle top-k"}, _RULER_32K),
    Run({"table": "Skylight leaderboard"}, reason="no profile yet: other settings of the method "
        "than those of this package's profiles, or another model"),
    Run({"table": "Table 3"}, reason="no profile yet: which tasks it averages was not recovered; "
        "the profile llama-3.1-8b runs all 13 at 16K tokens"),
    Run({"table": "HATA RULER"}, reason="no profile yet: a budget in tokens, two dense layers, and "
        "Llama-2 for some rows"),
    Run({"table": "vAttention Table 1"}, reason="no profile yet: averages of tasks at densities of "
        "its own sinks and windows"),
    Run({"benchmark": "AIME-2024"}, reason="no profile yet: AIME is no long-context benchmark of "
        "this package"),
    Run({"benchmark": "Loogle"}, reason="no profile yet: LooGLE is not in this package"),
    Run({"table": "Pareto plot"}, reason="no profile yet: samples, prompts and truncation of these "
        "runs are not known"),
    Run({"table": "output error plot"}, reason="no profile yet: notebook 02 measures output error "
        "on generated tasks, not on these"),
    Run({"metric": "auxiliary memory"}, reason="counted, not run: every receipt says it"),
    Run({"method": "HashAttention, fine-tuned"}, reason="no profile yet: hashes have to be trained "
        "on fine_tuning_split(records).train first"),
    Run({"metric": "cached tokens per token read at little loss"}, reason="a conclusion, not a "
        "run: Table 2 is what it rests on"),
    Run({"table": "abstract", "unit": "times"}, reason="no profile yet: GPT-FAST, FlashDecode and "
        "an A100 are not at hand; `make gpu` measures our step against torch's"),
    Run({"table": "abstract of the first version", "unit": "times"}, reason="no profile yet: "
        "LightLLM, gpt-fast and an L4 are not at hand"),
)  # fmt: skip


def run_of(row: pd.Series) -> Run:
    """The run that measures a row of load_paper(); PaperError if RUNS has no entry for it."""
    for run in RUNS:
        if run.measures(row):
            return run
    raise PaperError(
        f"{row.name}: no entry of reproduce.published.runs.RUNS says how to measure it; add "
        "a profile or the reason why there is none"
    )


def command(name: str) -> str:
    """The command line that runs the profile `name`, with the variables that a model or data set
    from the hub needs; /path/to/... stands for the reader's folders (hashattn.reproduce.access)."""
    profile = load_profile(name)
    parts = [f"make reproduce PROFILE={name}"]
    if profile.data is not None and is_hub_id(profile.data):
        parts.insert(0, "HASHATTN_DATA_DIR=/path/to/LongBench")
    if is_hub_id(profile.model):
        parts.insert(0, "HASHATTN_MODEL_DIR=/path/to/models")
    return " ".join(parts)
