"""Names that comparisons give to the hash selector with other weights than the usual ones."""

from __future__ import annotations

from typing import NamedTuple

from hashattn.selectors.usual import MethodStyle


class HashVariant(NamedTuple):
    """codes: the weights' name in UsualContext.codes; style: as of a method."""

    codes: str
    style: MethodStyle


HASH_VARIANTS = {
    "hash_64": HashVariant(
        "hash 64 bits", MethodStyle("#00579c", (8, 0, 0), "HashAttention, 64 bits")
    ),
    "hash_128": HashVariant(
        "hash 128 bits", MethodStyle("#003f7f", (7, 0, 0), "HashAttention, 128 bits")
    ),
    "hash_signs": HashVariant(
        "hash signs", MethodStyle("#3a86ff", (6, 0, 0), "HashAttention, learned signs")
    ),
    "hash_official": HashVariant(
        "hash official", MethodStyle("#7fb8d9", (5, 1, 180), "HashAttention, official recipe")
    ),
}
