"""What a hot set of keys and values holds of what a decoding model reads (notebook 04).

python -m hashattn.reproduce.experiments.hot_set --profile smollm2 writes a profile's table.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING

import pandas as pd
import torch

from hashattn.attention.attachment import attach
from hashattn.attention.budget import Budget
from hashattn.evaluation.answering import PrefilledContext
from hashattn.evaluation.benchmarks import texts
from hashattn.evaluation.measures.hot_set import HotSet
from hashattn.pilot.capacity.devices import DEVICES
from hashattn.pilot.capacity.hot_memory import HotMemory
from hashattn.pilot.capacity.shapes import ModelShape, model_shape
from hashattn.reproduce import plots
from hashattn.reproduce.experiments.own_run import run
from hashattn.reproduce.profiles import Profile
from hashattn.selectors.base import Selector

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "04_hot_set"
INDEX = ["tokens", "reading", "fraction", "layer"]
RANKED, DRAWN, KEPT = "ranked", "half drawn", "half drawn, coins kept"
_READINGS = {
    RANKED: {},
    DRAWN: {"sampled": 0.5},
    KEPT: {"sampled": 0.5, "fresh": False},
}
_FRACTIONS = (32, 16, 8)  # n over these are read beside sink and local tokens
_STEPS, _WARM = 256, 128
_KINDS = ("documentation", "code")  # of held-out text, a document each
# bytes a second to memory outside the device, and microseconds of a row of a file that no cache
# holds (20,000 rows of 512 bytes at random, asked for before they are read; 2 cores, one disk)
_LINKS = MappingProxyType({"PCIe 5 x16": 64e9, "PCIe 4 x16": 32e9})
_COLD_ROW_US = 11.0


@torch.no_grad()
def hot_set_table(
    profile: Profile, model, tokenizer, selector: Selector, lengths: Iterable[int]
) -> pd.DataFrame:
    """HotSet of the last _STEPS positions of held-out documents, teacher-forced in one call, the
    second half counted; the mean over documents by INDEX.

    fraction: n over it is read beside sink and local tokens. Columns: again and union, as
    HotSet.rows has them, and hits by the hot set's share of the tokens. The context before is
    prefilled dense.
    """
    rows = []
    for n in lengths:
        for ids, _ in texts.sequences(tokenizer, _KINDS, n, len(_KINDS), split=texts.EVAL):
            context = PrefilledContext(model, ids[:-_STEPS])
            asked = torch.tensor([ids[-_STEPS:]], device=model.device)
            for reading, part in _READINGS.items():
                for fraction in _FRACTIONS:
                    reads = Budget(profile.sink, profile.local, heavy=n // fraction, **part)
                    hot = HotSet(_WARM)
                    run = attach(model, selector, reads, sparse_rows=_STEPS)
                    with run, run.listen(hot):
                        model(input_ids=asked, past_key_values=context.fork(), use_cache=True,
                              logits_to_keep=1)  # fmt: skip
                    where = {"tokens": n, "reading": reading, "fraction": fraction}
                    rows += [row | where for row in hot.rows()]
    long = pd.DataFrame(rows).groupby([*INDEX, "share"], sort=False).mean().reset_index("share")
    means = long.groupby(INDEX, sort=False)[["again", "union"]].first()
    hits = long.set_index("share", append=True)["hits"].unstack()
    hits.columns = [f"{share:g}" for share in hits.columns]
    return means.join(hits).round(3)


def by_budget(table: pd.DataFrame) -> pd.DataFrame:
    """The mean over layers."""
    return table.groupby(INDEX[:-1], sort=False).mean()


def by_layer(table: pd.DataFrame, fraction: int = 32) -> pd.DataFrame:
    """The layers, where n / fraction tokens are read by rank."""
    return table.xs(RANKED, level="reading").xs(fraction, level="fraction")


def hit_lines(axis: Axes, table: pd.DataFrame) -> None:
    """Hits over the hot set's share of the tokens, of one length: a line and colour for each
    budget, solid where tokens are ranked, with the middle 80 % of layers as a band; dashed where
    half is drawn."""
    hits = table[_shares(table)]
    shares = [float(share) for share in hits]
    for number, (fraction, part) in enumerate(hits.groupby("fraction", sort=False)):
        for reading, line in ((RANKED, "-"), (DRAWN, "--")):
            own = part.xs(reading, level="reading")
            axis.plot(shares, own.mean(), line, color=f"C{number}", marker="o", markersize=4,
                      label=f"n/{fraction}, {reading}")  # fmt: skip
            if reading == RANKED:
                axis.fill_between(shares, own.quantile(0.1), own.quantile(0.9), alpha=0.15,
                                  color=f"C{number}", linewidth=0)  # fmt: skip
    plots.log_axis(axis, shares, [str(Fraction(share)) for share in shares])
    axis.set(xlabel="hot set / tokens cached", ylabel="hits", ylim=(0, 1.02))


def llama() -> ModelShape:
    """Llama-3.1-8B, from its published configuration."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
        dtype="bfloat16",
    )  # fmt: skip
    return model_shape(config, name="Llama-3.1-8B")


def worked_out(
    table: pd.DataFrame, model: ModelShape, context: int, *, code_bits: int = 32,
    shares: Iterable[float] = (1 / 4, 1 / 2), links: Mapping[str, float] = _LINKS,
    cold_row_us: float = _COLD_ROW_US, device: str = "h100-80gb",
) -> pd.DataFrame:  # fmt: skip
    """What by_budget's hit rates would mean for a model with `context` cached tokens, batch 1, if
    its heads read and reused as those measured did.

    By the table's index and the hot set's share: GB on the device (K, V and codes) and of all K and
    V; hits; MB that a step reads, rows and MB that it fetches; microseconds that these take over
    each link (bytes a second) and as cold rows of a file (cold_row_us each); and beside these what
    codes and rows, and all of K and V, take at the device's own bandwidth.
    """
    bandwidth = DEVICES[device].bandwidth
    whole, codes = model.full_bytes(context), model.code_bytes_per_token(code_bits) * context
    lines = {}
    for label, row in table.iterrows():
        fraction = label[table.index.names.index("fraction")]
        for share in shares:
            hot, hits = HotMemory(model, code_bits, share), row[f"{share:g}"]
            rows = row["union"] * context / fraction * hot.rows_per_token
            fetched, size = (1 - hits) * rows, hot.row_bytes
            lines[*label, share] = {
                "device GB": hot.bytes(context) / 1e9, "all GB": whole / 1e9, "hits": hits,
                "read MB": rows * size / 1e6, "fetched rows": fetched,
                "fetched MB": fetched * size / 1e6,
                **{f"{name} us": 1e6 * fetched * size / speed for name, speed in links.items()},
                "cold file us": fetched * cold_row_us,
                "on device us": 1e6 * (codes + rows * size) / bandwidth,
                "dense us": 1e6 * whole / bandwidth,
            }  # fmt: skip
    made = pd.DataFrame.from_dict(lines, orient="index")
    made.index = pd.MultiIndex.from_tuples(lines, names=[*table.index.names, "hot set"])
    return made


def in_words(worked: pd.DataFrame) -> str:
    """A sentence for each line of worked_out."""
    said = []
    for label, line in worked.iterrows():
        at = dict(zip(worked.index.names, label, strict=True))
        links = [name.removesuffix(" us") for name in worked if name.startswith("PCIe")]
        over = ", ".join(f"{line[f'{link} us']:,.0f} us over {link}" for link in links)
        said.append(
            f"n/{at['fraction']} {at['reading']}, a hot set of {Fraction(at['hot set'])}: "
            f"{line['device GB']:.1f} of {line['all GB']:.1f} GB stay on the device; of "
            f"{line['read MB']:,.0f} MB that a step reads {line['hits']:.1%} are there, and to "
            f"fetch the other {line['fetched MB']:,.0f} MB takes {over}, or "
            f"{line['cold file us']:,.0f} us from a file that no cache holds, beside "
            f"{line['on device us']:,.0f} us for codes and rows on the device and "
            f"{line['dense us']:,.0f} us for dense attention there."
        )
    return "\n".join(said)


def _shares(table: pd.DataFrame) -> list[str]:
    return [name for name in table if name[0].isdigit()]


if __name__ == "__main__":
    sys.exit(run(NAME, __doc__, hot_set_table, "frontier_length", "longest_length"))
