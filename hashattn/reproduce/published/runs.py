"""Which run of ours would give a published number: a profile, or what no profile can do yet."""

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
# the paper's name of a method: ours, that of the same recipe first
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
    """How rows of paper.csv that have these values come about here.

    rows: {column: value}, all of which a row has. profile: whose records hold the scores, None
    where no profile can give them, with the reason. claim: (notebook, claim) that measures it, for
    numbers that are no scores.
    """

    rows: Mapping[str, str]
    profile: str | None = None
    reason: str = ""
    claim: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if (self.profile is None) != bool(self.reason):
            raise PaperError(f"a run of {dict(self.rows)} needs either a profile or a reason")

    def gives(self, row: pd.Series) -> bool:
        """Whether this is how `row` comes about."""
        return all(row[column] == value for column, value in self.rows.items())


AUTHORS, OWN_BOOK = "llama-3.1-8b-authors", "llama-3.1-8b-longbench-e"
RULER_32K = "llama-3.1-8b-ruler"
SKYLIGHT = {"table": "Skylight leaderboard", "model": LLAMA}
RUNS = (  # the first that fits decides
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
    Run(SKYLIGHT | {"method": FULL}, RULER_32K),
    Run(SKYLIGHT | {"method": "HashAttention"}, RULER_32K),
    Run(SKYLIGHT | {"method": "oracle top-k"}, RULER_32K),
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
    """How a row of load_paper() comes about here; PaperError if nobody thought of it."""
    for run in RUNS:
        if run.gives(row):
            return run
    raise PaperError(
        f"{row.name}: no entry of reproduce.published.runs.RUNS says how it comes about; add "
        "a profile or the reason why there is none"
    )


def command(profile: str) -> str:
    """The command line that runs a profile, with the variables that a model or data set from the
    hub needs; /path/to/... stands for the reader's own folders (hashattn.reproduce.access)."""
    asked = load_profile(profile)
    parts = [f"make reproduce PROFILE={profile}"]
    if asked.data is not None and is_hub_id(asked.data):
        parts.insert(0, "HASHATTN_DATA_DIR=/path/to/LongBench")
    if is_hub_id(asked.model):
        parts.insert(0, "HASHATTN_MODEL_DIR=/path/to/models")
    return " ".join(parts)
