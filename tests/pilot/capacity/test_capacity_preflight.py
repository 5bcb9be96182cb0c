"""Verdicts, reasons and changes: each change is tried, and does what it says."""

import json
from dataclasses import replace

import pytest
from capacity_cases import DEVICE, LLAMA, SMALL, measurement

from hashattn.pilot.capacity.devices import DEVICES, device_named
from hashattn.pilot.capacity.machine import Line
from hashattn.pilot.capacity.preflight import HOST_US, preflight
from hashattn.pilot.capacity.result import Workload

K = 1024
A100, L4 = device_named("a100-40gb"), device_named("l4-24gb")
FREE = replace(LLAMA, positions=None)


def keys(notes):
    return [note.key for note in notes]


def values(notes, key):
    return next(note.values for note in notes if note.key == key)


def figures(result):
    return {line.key: line.value for line in result.lines}


def test_no_for_a_short_chat():
    result = preflight(LLAMA, Workload(2 * K), A100)
    assert result.verdict == "no"
    assert result.reasons[0].key == "attention_is_small"
    assert values(result.reasons, "attention_is_small")["share"] == pytest.approx(0.0164, abs=1e-4)
    assert values(result.reasons, "fits")["devices"] == result.devices == 1
    assert "memory_not_saved" in keys(result.reasons)
    assert keys(result.changes) == ["longer_context_beyond", "larger_batch"]


def test_worth_for_long_contexts_in_batches_on_five_devices():
    result = preflight(LLAMA, Workload(128 * K, 8), A100)
    assert result.verdict == "worth"
    assert result.reasons[0].key == "much_gained"
    # rows: 4 heads x 1/16 of K and V; codes: 64 bits of 2 x 128 x 16
    weights, cached = 16_060_522_496, 8 * 128 * K * 131_072
    speedup = (weights + cached) / (weights + cached / 4 + cached / 64)
    assert result.speedup == pytest.approx(speedup) == pytest.approx(2.92, abs=0.005)
    assert result.ceiling == pytest.approx(9.56, abs=0.005)
    needed = values(result.reasons, "does_not_fit")
    assert needed["devices"] == result.devices == 5
    assert needed["needed_gb"] == pytest.approx(155.65, abs=0.01)
    kept = values(result.reasons, "memory_not_saved")
    assert kept["kv_gb"] == pytest.approx(137.44, abs=0.01)
    assert kept["codes_gb"] == pytest.approx(2.147, abs=1e-3)
    assert values(result.changes, "fits_on")["device"] == "NVIDIA B200"


def test_marginal_where_a_part_is_gained():
    result = preflight(LLAMA, Workload(32 * K), L4)
    assert result.verdict == "marginal" and result.reasons[0].key == "some_gained"
    assert result.ceiling == pytest.approx(1.27, abs=0.005)


def test_a_gain_that_the_host_may_use_up_is_marginal():
    workload = Workload(128 * K)
    quick, slow = (preflight(LLAMA, workload, DEVICES[n]) for n in ("h100-80gb", "l40s-48gb"))
    assert quick.speedup == pytest.approx(slow.speedup) and quick.speedup > 1.5
    assert (quick.verdict, slow.verdict) == ("marginal", "worth")
    assert values(quick.reasons, "host_bound")["spare_us"] < HOST_US
    assert "host_bound" not in keys(slow.reasons)
    other = values(quick.changes, "other_device")["device"]
    (device,) = (d for d in DEVICES.values() if d.label == other)
    assert preflight(LLAMA, workload, device).verdict == "worth"
    faster = [d for d in DEVICES.values() if d.bandwidth > device.bandwidth]
    assert faster and all(preflight(LLAMA, workload, d).verdict != "worth" for d in faster)
    known = preflight(LLAMA, workload, DEVICES["h100-80gb"], fixed_us=5)
    assert known.verdict == "worth" and "host_bound" not in keys(known.reasons)
    assert "fixed_cost_given" in keys(known.reasons)


def test_no_beyond_the_models_positions():
    result = preflight(LLAMA, Workload(128 * K + 1, 8), A100)
    assert result.verdict == "no" and result.reasons[0].key == "beyond_positions"
    assert result.reasons[1].key == "much_gained"
    assert keys(result.changes) == ["within_positions"]
    assert preflight(FREE, Workload(128 * K + 1, 8), A100).verdict == "worth"


@pytest.mark.parametrize("context, batch", [(2 * K, 1), (8 * K, 2), (32 * K, 1), (4 * K, 16)])
def test_what_would_change_a_verdict_does(context, batch):
    result = preflight(FREE, Workload(context, batch), L4)
    assert result.verdict != "worth"
    longer = values(result.changes, "longer_context")["context"]
    assert preflight(FREE, Workload(longer, batch), L4).verdict == "worth"
    assert preflight(FREE, Workload(longer - K, batch), L4).verdict != "worth"
    larger = values(result.changes, "larger_batch")
    changed = preflight(FREE, Workload(context, larger["batch"]), L4)
    assert changed.verdict == "worth" and changed.devices == larger["devices"]
    assert preflight(FREE, Workload(context, larger["batch"] - 1), L4).verdict != "worth"


def test_smaller_weights_and_shared_lists_change_a_verdict():
    workload = Workload(64 * K)
    result = preflight(FREE, workload, L4)
    smaller = values(result.changes, "smaller_weights")
    quantised = preflight(replace(FREE, weight_bits=4), workload, L4)
    assert (result.verdict, quantised.verdict) == ("marginal", "worth")
    assert quantised.speedup == pytest.approx(smaller["speedup"])
    workload = Workload(72 * K)
    shared = values(preflight(FREE, workload, L4).changes, "shared_lists")
    one = preflight(FREE, workload, L4, lists="per_kv_head")
    assert one.verdict == "worth" and one.speedup == pytest.approx(shared["speedup"])


def test_what_would_take_a_worth_away_does():
    result = preflight(FREE, Workload(32 * K, 8), L4)
    assert result.verdict == "worth"
    shorter = values(result.changes, "shorter_context")["context"]
    assert preflight(FREE, Workload(shorter, 8), L4).verdict == "worth"
    assert preflight(FREE, Workload(shorter - 1, 8), L4).verdict != "worth"
    smaller = values(result.changes, "smaller_batch")["batch"]
    assert preflight(FREE, Workload(32 * K, smaller), L4).verdict == "worth"
    assert preflight(FREE, Workload(32 * K, smaller - 1), L4).verdict != "worth"
    spare = values(result.changes, "fixed_cost")["spare_us"]
    eaten = preflight(FREE, Workload(32 * K, 8), L4, fixed_us=spare)
    assert eaten.speedup == pytest.approx(1) and eaten.verdict == "no"


def test_a_budget_that_reads_everything_cannot_be_worth():
    result = preflight(SMALL, Workload(100_000), DEVICE, budget=1.0)
    assert result.verdict == "no" and result.reasons[0].key == "slower"
    assert figures(result)["break_even_bytes"] is None
    many_heads = preflight(replace(SMALL, query_heads=4), Workload(100_000), DEVICE, budget=1.0)
    assert keys(many_heads.changes) == ["nothing_changes"]


def test_times_measured_here_decide():
    workload = Workload(100_000)
    # dense: 1 s of weights + 1.1 ms + 2 x 101 ms; sparse 2 x 12 ms instead: 1.17x
    result = preflight(SMALL, workload, DEVICE, measured=measurement())
    assert result.verdict == "marginal" and result.reasons[1].key == "measured_here"
    here = figures(result)
    assert (here["dense_ms"], here["sparse_ms"]) == (pytest.approx(1203.1), pytest.approx(1025.1))
    assert here["measured_speedup"] == pytest.approx(1203.1 / 1025.1) == result.speedup
    assert here["fixed_us"] == pytest.approx(2000)
    # 1 ms + n us = 2 ms + .1 n us at 1,111.1 tokens
    assert here["break_even"] == 1112
    slow = measurement(sparse=Line(0.5, 1e-7))
    assert preflight(SMALL, workload, DEVICE, measured=slow).reasons[0].key == "slower"


def test_a_step_that_would_lose_stays_dense():
    # 1 ms + n us = 200 ms + .1 n us at 221,111.1 tokens
    late, workload = measurement(sparse=Line(0.2, 1e-7)), Workload(100_000, requests_per_day=10)
    result = preflight(SMALL, workload, DEVICE, measured=late)
    slower, stays = result.reasons[:2]
    assert (slower.key, stays.key) == ("slower", "dense_below")
    assert stays.values == {"tokens": 221_112}
    assert slower.values["sparse"] < 1 == result.speedup == figures(result)["measured_speedup"]
    assert result.cost.gpu_hours_sparse == result.cost.gpu_hours_dense
    assert figures(result)["sparse_ms"] > figures(result)["dense_ms"]
    small = preflight(SMALL, Workload(500), DEVICE, measured=measurement())
    assert keys(small.reasons)[:2] == ["attention_is_small", "dense_below"]
    never = measurement(sparse=Line(0.5, 1e-6))
    result = preflight(SMALL, Workload(100_000), DEVICE, measured=never)
    assert keys(result.reasons)[:2] == ["slower", "never_sparse"] and result.speedup == 1
    gains = preflight(SMALL, Workload(100_000), DEVICE, measured=measurement())
    assert not {"dense_below", "never_sparse"} & set(keys(gains.reasons)) and gains.speedup > 1


def test_what_fits_by_hand():
    result = preflight(SMALL, Workload(1_000_000, 3), DEVICE)
    here = figures(result)
    per_token, rest = 2 * 1024 + 64, 1e9 + 3 * 100 * 1024
    assert here["stored"] == rest + 3 * 1_000_000 * per_token
    assert here["longest_context"] == int((9e9 - rest) / (3 * per_token))
    assert here["largest_batch"] == int(8e9 / (1_000_000 * per_token + 100 * 1024))
    too_large = replace(SMALL, parameters=5_000_000_000)
    here = figures(preflight(too_large, Workload(10), DEVICE))
    assert (here["longest_context"], here["largest_batch"]) == (0, 0)
    assert figures(preflight(SMALL, Workload(10), DEVICE))["largest_batch"] is None


def test_cost_from_traffic_and_price():
    # a dense step takes 1 GB + 100 KB + 2 GB of 1 TB/s for each of 2 sequences' tokens
    workload = Workload(1_000_000, 2, new_tokens=100, requests_per_day=36_000, price_per_hour=2.5,
                        currency="JPY", days=10)  # fmt: skip
    cost = preflight(SMALL, workload, DEVICE).cost
    step = (1e9 + 2 * 100 * 1024 + 2 * 1_000_000 * 2048) / 1e12
    assert cost.tokens_per_day == 3_600_000
    assert cost.gpu_hours_dense == pytest.approx(10 * 3_600_000 * step / 2 / 3600)
    assert cost.money_dense == pytest.approx(2.5 * cost.gpu_hours_dense)
    assert cost.gpu_hours_sparse / cost.gpu_hours_dense == pytest.approx(
        1 / preflight(SMALL, workload, DEVICE).speedup
    )
    assert (cost.currency, cost.days) == ("JPY", 10)
    assert preflight(SMALL, replace(workload, price_per_hour=None), DEVICE).cost.money_dense is None
    assert preflight(SMALL, replace(workload, requests_per_day=None), DEVICE).cost is None
    assert preflight(SMALL, replace(workload, requests_per_day=0.0), DEVICE).cost is None


def test_windows_and_experts_are_named():
    assert values(preflight(SMALL, Workload(5000), DEVICE).reasons, "windows") == {
        "windows": 1, "layers": 3,
    }  # fmt: skip
    mixture = replace(SMALL, expert_parameters=400_000_000, experts=8, chosen=2)
    result = preflight(mixture, Workload(5000, 2), DEVICE)
    read = values(result.reasons, "experts")["read"]
    assert read == pytest.approx(0.2 + 0.8 * (1 - 0.75**2))
    assert figures(result)["weights_read"] == pytest.approx(read * 1e9)


def test_the_result_is_plain_json():
    result = preflight(SMALL, Workload(5000), DEVICE, measured=measurement())
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["verdict"] == result.verdict and content["cost"] is None
    assert set(content["reasons"][0]) == set(content["changes"][0]) == {"key", "values"}
    assert content["lines"][0] == {"key": "kv_bytes_per_token", "value": 2048.0, "unit": "bytes"}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"context": -1}, "context = -1: must be"),
        ({"context": 0}, "context = 0: must be"),
        ({"context": 2.5}, "context = 2.5: must be"),
        ({"context": 2**31}, "context = "),
        ({"batch": 0}, "batch = 0: must be"),
        ({"batch": True}, "batch = True: must be"),
        ({"new_tokens": 0}, "new_tokens = 0"),
        ({"requests_per_day": -1.0}, "requests_per_day = -1.0"),
        ({"price_per_hour": float("inf")}, "price_per_hour = inf"),
        ({"currency": ""}, "currency = ''"),
        ({"days": 0}, "days = 0"),
    ],
)
def test_bad_workloads(fields, message):
    with pytest.raises(ValueError, match=message):
        Workload(**{"context": 1000} | fields)
