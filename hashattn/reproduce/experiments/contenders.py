"""The selectors of notebook 02's frontier: every method at the memory it is compared at."""

from __future__ import annotations

import math
from itertools import product

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
from hashattn.selectors.quest import QuestSelector
from hashattn.selectors.rabitq import FACTOR_BITS, RaBitQSelector
from hashattn.selectors.transform import TransformSelector
from hashattn.selectors.wrapper import WrapperSelector

_HATA_STEPS = 150  # 300 steps of 8 queries, ten times the work, give at most 5 % less error at 1/8
_BUCKET_BITS = 8  # hyperplanes per table of SOCKET and MagicPIG
_GRID_BITS = 4  # of a component of Loki, a channel of Double Sparsity
SLACK = 1.125  # of a memory size that a method may use: what a page or a factor adds
_PAGE = 16  # tokens of a Quest page, as its authors' default
# methods that `other_methods` leaves out: bounds and floors, this package's own, those that drop
# tokens or decide from attention they saw, and SparQ, which needs a second copy of K
_ELSEWHERE = ("dense", "oracle", "oracle_top_p", "window", "streaming_llm", "random", "hash",
             "rerank", "residual", "h2o", "snapkv", "infllm", "sparq")  # fmt: skip
_SIZED = (
    "transform",
    "rabitq",
    "lsh",
    "hata",
    "socket",
    "quest",
    "pqcache",
    "double_sparsity",
    "loki",
    "magicpig",
)


def our_codes(profile: Profile, model, tokenizer, weights: HashWeights) -> dict[str, HashWeights]:
    """Hash weights of every size in profile.memory or named by a method (hash_64), by name, those
    with a learned bit for each direction, and the official ones."""
    codes = {
        f"hash {bits} bits": weights
        if bits == weights.config.bits
        else hash_weights(profile, model, tokenizer, f"{bits}_bits")
        for bits in MEMORY
        if bits in profile.memory or f"hash_{bits}" in profile.methods
    }
    others = ("signs", "official")
    return codes | {f"hash {n}": hash_weights(profile, model, tokenizer, n) for n in others}


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


def tricks(weights: HashWeights, signs: HashWeights, seed: int) -> dict[str, Selector]:
    """Learned signs with the paper's scoring, then one trick after the other, up to `weights`."""

    def scored(codes: HashWeights, scoring: str, layout: Layout = "per_query_head") -> Selector:
        return make_selector("hash", weights=codes, scoring=scoring, layout=layout)

    digits = scored(weights, "graded")
    return {
        "hash signs by bits, one list per group": scored(signs, "hamming", "per_kv_head"),
        "hash signs by bits": scored(signs, "hamming"),
        "hash signs graded": scored(signs, "graded"),
        "hash digits, one list per group": scored(weights, "graded", "per_kv_head"),
        "hash digits": digits,
        "hash digits, real query": scored(weights, "asymmetric"),
        "hash re-ranked 2x": make_selector("rerank", base=digits, factor=2),
        "hash re-ranked 2x, value norms": make_selector(
            "rerank", base=digits, factor=2, value_norms=True
        ),
        "hash re-ranked 4x": make_selector("rerank", base=digits, factor=4),
        "hash and a sample": make_selector("residual", base=digits, share=0.25, seed=seed),
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
        selectors[f"transform {bits} bits"] = TransformSelector.calibrate(calibrated, bits)
        selectors[f"lsh {bits} bits"] = make_selector("lsh", bits=bits, seed=seed)
        selectors[f"lsh best {bits} bits"] = RaBitQSelector.calibrate(
            calibrated, planes=bits, seed=seed
        )
        selectors[f"hata {bits} bits"] = HATASelector.train(
            calibrated, bits=bits, steps=steps, rows_per_step=2, seed=seed, progress=False
        )
        tables = {"hyperplanes": _BUCKET_BITS, "tables": bits // _BUCKET_BITS, "seed": seed}
        selectors[f"socket {bits} bits"] = make_selector("socket", **tables)
        for page, bound in quest_pages(bits, dim):
            name = f"quest page {page}, {bound} bits"
            selectors[name] = QuestSelector.calibrate(calibrated, page, bound)
        parts, code = product_codes(bits, dim, profile.frontier_length)
        if parts:
            selectors[f"pqcache {parts} parts of {code} bits"] = make_selector(
                "pqcache", parts=parts, bits=code, layout="per_query_head"
            )
        width = min(dim, bits // _GRID_BITS)
        selectors[f"double_sparsity {width} channels"] = DoubleSparsity.calibrate(
            calibrated, channels_per_head=width, label_bits=_GRID_BITS, grid=True,
            channel_layout="per_kv_head", layout="per_query_head",
        )  # fmt: skip
        selectors[f"loki {width} components"] = LokiSelector.calibrate(
            calibrated, components=width, bits=_GRID_BITS
        )
        for digits, factor in product((1, 2, 4), (False, True)):
            size = digits * dim + factor * FACTOR_BITS
            if bits / 2 < size <= SLACK * bits:
                name = f"rabitq {digits} bit a channel" + ", factor" * factor
                selectors[name] = RaBitQSelector.calibrate(
                    calibrated, digits=digits, factor=factor, seed=seed
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
    """Quest's (tokens per page, bits per bound) that fit into `bits` a token: exact bounds with
    pages no longer than the authors', and 4 and 2 bits with the shortest pages, 2 tokens at least.
    """
    pages = [(math.ceil(2 * head_dim * bound / bits), bound) for bound in (16, 4, 2)]
    fits = [(page, bound) for page, bound in pages if page <= _PAGE and (page > 1 or bound == 16)]
    return [(page, bound) for page, bound in fits if 2 * head_dim * bound / page > 0.8 * bits]


def product_codes(bits: int, head_dim: int, tokens: int) -> tuple[int, int]:
    """PQCache's (parts, bits of a part's code) that store the most in `bits` a token, centroids of
    `tokens` tokens included; (0, 0) where nothing fits.

    Codes of 5 bits or more: many parts of few centroids are worse than fewer parts of more.
    """
    fits = [(0, 0)]
    for code in range(5, 9):
        codebook = 2**code * head_dim * 16 / tokens
        fits += [
            (parts, code)
            for parts in range(1, head_dim + 1)
            if head_dim % parts == 0 and parts * code + codebook <= bits
        ]
    return max(fits, key=lambda fit: (fit[0] * fit[1], fit[1]))
