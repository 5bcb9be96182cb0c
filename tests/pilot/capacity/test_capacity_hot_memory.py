"""Bytes of hot sets, of fewer bits and of saved contexts, worked out by hand."""

from dataclasses import replace

import pytest
from capacity_cases import DEVICE, LLAMA, SMALL

from hashattn.pilot.capacity.hot_memory import HotMemory
from hashattn.pilot.capacity.preflight import preflight
from hashattn.pilot.capacity.result import Workload
from hashattn.pilot.capacity.wording import summary

N = 131072


@pytest.mark.parametrize(
    "share, bits, row, in_all",
    [
        # 32 layers of 8 KV heads: 256 rows a token; a key or value has 128 numbers of 2 bytes
        (1, None, 512, 256 * 512),
        (1 / 2, None, 512, 256 * 256),
        (1 / 4, None, 512, 256 * 128),
        (1, 8, 2 * 128 + 4, 256 * 260),
        (1, 4, 2 * 64 + 4, 256 * 132),
        (1 / 4, 4, 132, 256 * 33),
    ],
)
def test_llama_by_hand(share, bits, row, in_all):
    held = HotMemory(LLAMA, 32, share, bits)
    assert held.row_bytes == row
    codes = 256 * 4
    assert held.bytes_per_token == in_all + codes
    assert held.bytes(N, 2) == 2 * N * (in_all + codes)
    # 72 GB of 80 less 16,060,522,496 bytes of weights
    assert held.longest(80e9, 2) == (72_000_000_000 - 16_060_522_496) // (2 * (in_all + codes))


def test_a_gigabyte_of_llama_holds_what_the_issue_counts():
    tokens = {bits: 1e9 / HotMemory(LLAMA, None, 1, bits).bytes_per_token for bits in (None, 8, 4)}
    assert [round(each, -2) for each in tokens.values()] == [7600, 15000, 29600]


def test_windows_stay_whole_and_what_does_not_fit_is_nothing():
    # two layers of 1,024 bytes a token, one window of 100; codes of 2 layers x 4 heads x 8 bytes
    held = HotMemory(SMALL, 64, 1 / 4)
    assert held.bytes(1000) == 1000 * (2 * 1024 / 4 + 64) + 100 * 1024
    assert held.bytes(10) == 10 * (2 * 1024 / 4 + 64) + 10 * 1024
    assert held.longest(10e9) == int((9e9 - 1e9 - 100 * 1024) // (2 * 1024 / 4 + 64))
    assert held.longest(1e9) == 0
    assert HotMemory(SMALL, None).bytes_per_token == SMALL.kv_bytes_per_token


def test_the_preflight_says_what_is_held_and_what_a_saved_context_spares():
    result = preflight(LLAMA, Workload(N, 2), replace(DEVICE, memory=80e9), bits=32)
    said = {(each.note.key, *each.note.values.values()): each for each in result.memory}
    assert list(said) == [
        ("held",), ("held_hot", "1/2"), ("held_hot", "1/4"), ("held_bits", 8), ("held_bits", 4),
        ("held_hot_bits", "1/4", 4),
    ]  # fmt: skip
    assert said["held",].bytes == 2 * N * (256 * 512 + 1024)
    assert said["held_hot", "1/4"].bytes == 2 * N * (256 * 128 + 1024)
    assert said["held_bits", 4].longest_context == 55_939_477_504 // (2 * (256 * 132 + 1024))
    saved = next(note.values for note in result.reasons if note.key == "saved_context")
    assert saved == {"questions": 10, "context": N, "tokens": 10 * N,
                     "file_gb": pytest.approx(N * (256 * 512 + 1024) / 1e9)}  # fmt: skip
    english, japanese = summary(result), summary(result, "ja")
    assert "- a hot set of 1/4, the rest in host memory or a file: 8.86 GB; contexts of" in english
    assert "1/4 のホットセット（残りはホストのメモリまたはファイル）：8.86 GB。" in japanese
    assert "(17.3 GB on disk); reading it for each takes 1,310,720 tokens" in english
    assert "毎回読むと合計 1,310,720 トークン" in japanese


def test_head_dims_that_the_kernels_do_not_take_are_not_offered_in_fewer_bits():
    odd = replace(LLAMA, head_dim=72)
    result = preflight(odd, Workload(N), DEVICE)
    assert [each.note.key for each in result.memory] == ["held", "held_hot", "held_hot"]
    with pytest.raises(ValueError, match="key_dim = 72: must be a positive multiple of 16"):
        HotMemory(odd, kv_bits=8)


@pytest.mark.parametrize("fields, message", [
    ({"share": 0}, r"share = 0: must be a number in \(0, 1\]"),
    ({"share": 1.5}, "share = 1.5"),
    ({"kv_bits": 2}, "bits = 2: must be 8 or 4"),
])  # fmt: skip
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        HotMemory(LLAMA, **fields)
