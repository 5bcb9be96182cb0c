"""The selectors of notebook 02's frontier: every method at the memory it is compared at."""

from __future__ import annotations

import math

from hashattn.base.layout import Layout
from hashattn.hashing.capture import CapturedLayer
from hashattn.hashing.weights import HashWeights
from hashattn.reproduce.experiments.common import hash_weights, shipped_variant
from hashattn.reproduce.profiles import MEMORY, Profile
from hashattn.selectors import HASH_VARIANTS, UsualContext, make_selector, selector_class
from hashattn.selectors.base import Selector
from hashattn.selectors.double_sparsity import DoubleSparsitySelector as DoubleSparsity
from hashattn.selectors.hash import HashSelector
from hashattn.selectors.hata import HATASelector
from hashattn.selectors.loki import LokiSelector
from hashattn.selectors.magicpig import MagicPIGSelector
from hashattn.selectors.wrapper import WrapperSelector

_HATA_STEPS = 150  # 300 steps of 8 queries, ten times the work, give at most 5 % less error at 1/8
_BUCKET_BITS = 8  # hyperplanes per table of SOCKET and MagicPIG
_CODE_BITS = 6  # of a PQCache sub-vector: 64 centroids, as its authors' default
SLACK = 1.125  # of a memory size that a method may use: Quest's quantised pages add a scale each
_PAGE = 16  # tokens of a Quest page, as its authors' default
# methods that `other_methods` leaves out: bounds and floors, this package's own, those that drop
# tokens or decide from attention they saw, and SparQ, which needs a second copy of K
_ELSEWHERE = ("dense", "oracle", "oracle_top_p", "window", "streaming_llm", "random", "hash",
             "rerank", "residual", "h2o", "snapkv", "infllm", "sparq")  # fmt: skip
_SIZED = ("lsh", "hata", "socket", "quest", "pqcache", "double_sparsity", "loki", "magicpig")


def our_codes(profile: Profile, model, tokenizer, weights: HashWeights) -> dict[str, HashWeights]:
    """Hash weights of every size in profile.memory or named by a method (hash_64), by name, and the
    official ones."""
    codes = {
        f"hash {bits} bits": weights
        if bits == weights.config.bits
        else hash_weights(profile, model, tokenizer, f"{bits}_bits")
        for bits in MEMORY
        if bits in profile.memory or f"hash_{bits}" in profile.methods
    }
    return codes | {"hash official": hash_weights(profile, model, tokenizer, "official")}


def all_codes(
    profile: Profile, model, tokenizer, codes: dict[str, HashWeights]
) -> dict[str, HashWeights]:
    """`our_codes` and all other sizes that are shipped with the model; nothing is trained."""
    more = {
        f"hash {bits} bits": hash_weights(profile, model, tokenizer, f"{bits}_bits")
        for bits in MEMORY
        if f"hash {bits} bits" not in codes and shipped_variant(profile, f"{bits}_bits")
    }
    return codes | more


def hash_selectors(codes: dict[str, HashWeights]) -> dict[str, Selector]:
    """A selector for each, scoring as it was trained: official codes compare bits with bits."""
    return {name: HashSelector.as_trained(weights) for name, weights in codes.items()}


def tricks(weights: HashWeights, seed: int) -> dict[str, Selector]:
    """The same codes with the paper's scoring, then one trick after the other."""

    def scored(scoring: str, layout: Layout) -> Selector:
        return make_selector("hash", weights=weights, scoring=scoring, layout=layout)

    graded = scored("graded", "per_query_head")
    return {
        "hash by bits, one list per group": scored("hamming", "per_kv_head"),
        "hash by bits": scored("hamming", "per_query_head"),
        "hash graded, one list per group": scored("graded", "per_kv_head"),
        "hash graded": graded,
        "hash asymmetric": scored("asymmetric", "per_query_head"),
        "hash re-ranked 2x": make_selector("rerank", base=graded, factor=2),
        "hash re-ranked 2x, value norms": make_selector(
            "rerank", base=graded, factor=2, value_norms=True
        ),
        "hash re-ranked 4x": make_selector("rerank", base=graded, factor=4),
        "hash and a sample": make_selector("residual", base=graded, share=0.25, seed=seed),
    }


def oracles() -> dict[str, Selector]:
    """Exact top-k: per query head, per group, and with value norms in the score."""
    return {
        "oracle": make_selector("oracle"),
        "oracle per group": make_selector("oracle", layout="per_kv_head"),
        "oracle with value norms": make_selector("oracle", value_norms=True),
    }


def other_methods(profile: Profile, calibrated: list[CapturedLayer]) -> dict[str, Selector]:
    """Every other method that keeps all tokens, at each size of profile.memory that it can have, in
    its best layout at equal memory; Quest and PQCache also at their authors' settings. The
    profile's methods without sizes (_SIZED) come in their usual setting.

    Calibrated and trained on `calibrated`, sequences like those that train the hashes, for the
    layers that the profile measures.
    """
    measured = profile.layers or {layer.layer for layer in calibrated}
    calibrated = [layer for layer in calibrated if layer.layer in measured]
    dim = calibrated[0].keys.shape[-1]
    seed, selectors = profile.seed, {"pqcache official": make_selector("pqcache")}
    steps = profile.training.at_most(_HATA_STEPS)
    for bits in profile.memory:
        selectors[f"lsh {bits} bits"] = make_selector("lsh", bits=bits, seed=seed)
        selectors[f"hata {bits} bits"] = HATASelector.train(
            calibrated, bits=bits, steps=steps, rows_per_step=2, seed=seed, progress=False
        )
        tables = {"hyperplanes": _BUCKET_BITS, "tables": bits // _BUCKET_BITS, "seed": seed}
        selectors[f"socket {bits} bits"] = make_selector("socket", **tables)
        for page, bound in quest_pages(bits, dim):
            name = f"quest page {page}, {bound} bits"
            selectors[name] = make_selector("quest", page=page, bits=bound)
        codebook = 2**_CODE_BITS * dim * 16 / profile.frontier_length  # centroids' bits per token
        parts = _at_most(dim, (bits - codebook) / _CODE_BITS)
        if parts:
            name = f"pqcache {parts} parts"
            selectors[name] = make_selector(
                "pqcache", parts=parts, bits=_CODE_BITS, layout="per_query_head"
            )
        if bits > 32:  # a label's scale and offset take 32
            label_bits = 2 if bits - 32 <= 2 * dim else 4
            channels = min(dim, (bits - 32) // label_bits)
            selectors[f"double_sparsity {channels} channels"] = DoubleSparsity.calibrate(
                calibrated, channels_per_head=channels, label_bits=label_bits,
                channel_layout="per_kv_head", layout="per_query_head",
            )  # fmt: skip
            selectors[f"loki {bits // 16} components"] = LokiSelector.calibrate(
                calibrated, components=bits // 16
            )
        if bits >= 256:  # with fewer tables too few tokens collide twice: error 0.65 at 128 bits
            selectors[f"magicpig {bits} bits"] = MagicPIGSelector.calibrate(
                calibrated, bits=_BUCKET_BITS, tables=bits // _BUCKET_BITS, seed=seed
            )
    return selectors | _new_methods(profile, calibrated)


def _new_methods(profile: Profile, calibrated: list[CapturedLayer]) -> dict[str, Selector]:
    """The profile's methods without sizes, in their usual setting.

    Without those that need hash weights or wrap a method that may: there are no weights here.
    """
    queries, keys = calibrated[0].queries, calibrated[0].keys
    context = UsualContext(
        calibrated,
        len(queries) // len(keys),
        keys.shape[-1],
        seed=profile.seed,
        steps=profile.training.steps,
    )
    names = [name for name in profile.methods if name not in (*_ELSEWHERE, *_SIZED, *HASH_VARIANTS)]
    classes = {name: selector_class(name) for name in names}
    return {
        name: cls.usual(context)
        for name, cls in classes.items()
        if cls.needs in ("nothing", "calibration")
        and not (cls.evicts or cls.observes or issubclass(cls, WrapperSelector))
    }


def quest_pages(bits: int, head_dim: int) -> list[tuple[int, int]]:
    """Quest's (tokens per page, bits per bound) that fit into `bits` a token, SLACK included.

    Exact bounds, if they fit with pages no longer than the authors'; and bounds quantised to 4
    bits, or to 8 where 4 would leave pages of fewer than 4 tokens. Each with its shortest page.
    """

    def shortest(bound: int, limit: float) -> int:
        return math.ceil(
            make_selector("quest", page=1, bits=bound).nominal_bits(1, head_dim) / limit
        )

    exact, four = shortest(16, bits), shortest(4, SLACK * bits)
    quantised = (four, 4) if four >= 4 else (shortest(8, SLACK * bits), 8)
    return [(exact, 16), quantised] if exact <= _PAGE else [quantised]


def _at_most(dim: int, limit: float) -> int:
    """The largest divisor of `dim` up to `limit`, 0 if there is none."""
    return max((parts for parts in range(1, dim + 1) if dim % parts == 0 and parts <= limit),
               default=0)  # fmt: skip
