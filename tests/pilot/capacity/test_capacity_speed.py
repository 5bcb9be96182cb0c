"""Bytes and seconds of a decode step, worked out by hand."""

from dataclasses import replace

import pytest
from capacity_cases import DEVICE, LLAMA, SMALL, measurement

from hashattn.pilot.capacity.devices import device_named
from hashattn.pilot.capacity.machine import MeasurementError
from hashattn.pilot.capacity.speed import Speed, least

K = 1024


@pytest.mark.parametrize(
    "context, batch, ceiling, share",
    [
        (32 * K, 1, 1.27, 0.21),
        (128 * K, 1, 2.07, 0.52),
        (32 * K, 8, 3.14, 0.68),
        (2 * K, 1, 1.02, 0.016),
    ],
)
def test_ceilings_of_llama_3_1_8b(context, batch, ceiling, share):
    speed = Speed(LLAMA, device_named("h100-80gb"))
    assert speed.ceiling(context, batch) == pytest.approx(ceiling, abs=0.005)
    assert speed.share(context, batch) == pytest.approx(share, abs=0.005)
    weights, cached = 16_060_522_496, 131_072 * context * batch
    assert speed.ceiling(context, batch) == pytest.approx((weights + cached) / weights)
    assert speed.share(context, batch) == pytest.approx(cached / (weights + cached))


def test_bytes_of_a_step_by_hand():
    speed = Speed(SMALL, DEVICE)  # 1/16, 64 bits, a list for each of the 2 heads of a group
    # 1,000 tokens, 2 sequences; a row of a layer: 2 x 4 heads x 64 x 2 bytes = 1,024
    weights, window, cached = 1e9, 2 * 100 * 1024, 2 * 1000 * 2 * 1024
    assert speed.dense_bytes(1000, 2) == weights + window + cached
    # 62 tokens a head; two heads of a group read at most 124 of 1,000; codes: 8 bytes x 4 x 2
    assert speed.rows(1000) == 62 and speed.rows_share(1000) == 0.124
    assert speed.sparse_bytes(1000, 2) == pytest.approx(
        weights + window + 0.124 * cached + 2 * 1000 * 64
    )
    assert speed.dense_seconds(1000, 2) == pytest.approx(speed.dense_bytes(1000, 2) / 1e12)
    assert speed.ceiling(1000, 2) == pytest.approx(1 + cached / (weights + window))
    assert speed.speedup(1000, 2) == pytest.approx(speed.bytes_speedup(1000, 2))


def test_one_list_for_a_group_reads_half_of_it():
    assert Speed(SMALL, DEVICE, lists="per_kv_head").rows_share(1000) == 0.062


@pytest.mark.parametrize("budget, context", [(1.0, 1000), (0.6, 1000), (1 / 16, 20)])
def test_no_more_rows_are_read_than_there_are(budget, context):
    """Two heads of .6 are all; sink and local tokens alone are more than 20."""
    speed = Speed(SMALL, DEVICE, budget)
    assert speed.rows_share(context) == 1.0
    assert speed.sparse_bytes(context, 1) > speed.dense_bytes(context, 1)  # the codes


def test_memory_and_devices_by_hand():
    speed = Speed(SMALL, DEVICE)
    # weights + sequences x (2 layers of all + the window + codes)
    assert speed.stored_bytes(1000, 3) == 1e9 + 3 * (2 * 1000 * 1024 + 100 * 1024 + 1000 * 64)
    assert speed.devices(1000, 3) == 1
    # 9 GB are usable: 8 GB beside the weights, 2.112 GB for 1M tokens
    assert [speed.devices(1_000_000, batch) for batch in (3, 4)] == [1, 2]


def test_llama_at_128k_and_batch_8_takes_five_devices_of_40_gb():
    speed = Speed(LLAMA, device_named("a100-40gb"))
    total = 16_060_522_496 + 8 * 128 * K * (131_072 + 2048)
    assert speed.stored_bytes(128 * K, 8) == total  # 155.6 GB
    assert speed.devices(128 * K, 8) == 5  # of 36 GB


def test_measured_times_count_instead_of_bytes():
    speed = Speed(SMALL, DEVICE, measured=measurement())
    # 1 s of weights; a window layer of 100 tokens: 1.1 ms; two layers; 3 sequences of 4,000 tokens
    other = 1 + 3 * 1.1e-3
    assert speed.dense_seconds(4000, 3) == pytest.approx(other + 3 * 2 * (1e-3 + 4e-3))
    assert speed.sparse_seconds(4000, 3) == pytest.approx(other + 3 * 2 * (2e-3 + 0.4e-3))
    assert speed.bytes_speedup(4000, 3) == Speed(SMALL, DEVICE).bytes_speedup(4000, 3)


def test_a_fixed_cost_of_every_layer_and_device():
    plain, fixed = Speed(SMALL, DEVICE), Speed(SMALL, DEVICE, fixed_us=50)
    for batch, devices in ((1, 1), (4, 2)):
        assert plain.devices(1_000_000, batch) == devices
        added = fixed.sparse_seconds(1_000_000, batch) - plain.sparse_seconds(1_000_000, batch)
        assert added == pytest.approx(2 * 50e-6 * devices)
        spare = plain.spare_us(1_000_000, batch)
        assert fixed.spare_us(1_000_000, batch) == pytest.approx(spare - 50)
        even = replace(plain, fixed_us=spare)  # what is spare is what may be spent
        assert even.speedup(1_000_000, batch) == pytest.approx(1)


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("budget", 0, r"\(0, 1\]"),
        ("budget", 1.5, r"\(0, 1\]"),
        ("budget", float("nan"), r"\(0, 1\]"),
        ("bits", 33, "multiple of 32"),
        ("bits", 0, "multiple of 32"),
        ("lists", "one", "per_kv_head"),
        ("fixed_us", -1, "at least 0"),
    ],
)
def test_bad_settings(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field} = .*{allowed}"):
        Speed(SMALL, DEVICE, **{field: value})


def test_times_of_another_model_or_budget_are_refused():
    with pytest.raises(MeasurementError, match="measure it"):
        Speed(SMALL, device_named("this-machine"))
    with pytest.raises(MeasurementError, match="query_heads 32, not 8.*measure again"):
        Speed(SMALL, DEVICE, measured=measurement(LLAMA))
    with pytest.raises(MeasurementError, match="budget 0.0625, not 0.5"):
        Speed(SMALL, DEVICE, 0.5, measured=measurement())


@pytest.mark.parametrize("most", [1, 2, 5, 64, 100])
def test_least_is_the_first(most):
    for first in range(1, most + 3):
        expected = next((n for n in range(1, most + 1) if n >= first), None)
        assert least(lambda n, first=first: n >= first, most) == expected
