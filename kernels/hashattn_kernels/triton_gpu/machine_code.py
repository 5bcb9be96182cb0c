"""Issue slots of loops in NVIDIA machine code (SASS, as cuobjdump prints it).

A slot is one instruction of a warp at 64 lanes a clock and multiprocessor, the full rate of
integers on compute capability 8.0 and 9.0. Counting ones, finding bits, conversions and special
functions run at a quarter of it; shared and global memory and shuffles take two slots, however wide
(throughputs: CUDA C++ Programming Guide, arithmetic instructions). The guide does not list products
of bytes (IDP): they are taken to run as the multiplications do with which they share a pipe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);")
_QUARTER = ("POPC", "FLO", "BREV", "I2F", "F2I", "MUFU")
_HALF = ("SHFL", "LDS", "STS", "LDG", "STG")
_COUNTED_DONE = ("ATOMG", "ATOM.", "RED.")


@dataclass(frozen=True)
class Instruction:
    """An instruction, its address and where it branches to, if it does."""

    address: int
    operation: str
    target: int | None = None

    @property
    def slots(self) -> int:
        """Issue slots of a warp."""
        if self.operation.startswith(_QUARTER):
            return 4
        return 2 if self.operation.startswith(_HALF) else 1

    @property
    def words_loaded(self) -> int:
        """32-bit words that each lane loads from global memory."""
        if not self.operation.startswith("LDG"):
            return 0
        wide = re.search(r"\.(64|128)\b", self.operation)
        return int(wide[1]) // 32 if wide else 1


def instructions(code: str) -> list[Instruction]:
    """All instructions of a dump, in order."""
    found = []
    for address, operation, operands in _LINE.findall(code):
        target = re.search(r"0x([0-9a-f]+)", operands) if operation.startswith("BRA") else None
        found.append(Instruction(int(address, 16), operation, target and int(target[1], 16)))
    return found


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The instructions of every loop (what a branch backwards encloses), without those of loops
    inside it."""
    spans = {}
    for each in code:
        if each.target is not None and each.target < each.address:
            spans[each.target] = max(each.address, spans.get(each.target, 0))
    found = []
    for start, end in sorted(spans.items()):
        inner = [
            (a, b) for a, b in spans.items() if start <= a and b <= end and (a, b) != (start, end)
        ]
        found.append(
            [
                each
                for each in code
                if start <= each.address <= end
                and not any(a <= each.address <= b for a, b in inner)
            ]
        )
    return found


def slots_a_key(code: str, keys: float) -> list[float]:
    """Slots for each key of the loops over keys, the cheapest first.

    keys: in a word that is loaded. A loop over keys loads from global memory before the program
    counts itself done, where it does (what follows runs once in a row).
    """
    every = instructions(code)
    done = [each.address for each in every if each.operation.startswith(_COUNTED_DONE)]
    found = []
    for loop in loops(every):
        words = sum(each.words_loaded for each in loop)
        if words and not (done and loop[0].address > min(done)):
            found.append(sum(each.slots for each in loop) / (words * keys))
    return sorted(found)
