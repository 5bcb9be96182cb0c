"""A model of round numbers, a device and a measurement for tests of the pre-flight."""

from dataclasses import replace

from hashattn.pilot.capacity.devices import Device
from hashattn.pilot.capacity.machine import Line, Measurement, Timing
from hashattn.pilot.capacity.shapes import ModelShape

# 8.03 G parameters of 2 bytes, 131,072 bytes of K and V a token: Llama-3.1-8B
LLAMA = ModelShape(
    name="Llama-3.1-8B", model_type="llama", query_heads=32, kv_heads=8, head_dim=128,
    hidden_size=4096, full_layers=32, windows=(), fixed_layers=0, parameters=8_030_261_248,
    kept_parameters=1_050_939_392, positions=131072,
)  # fmt: skip
# 1 GB of weights; 1,024 bytes of K and V a token and layer, two layers of all and one of 100 tokens
SMALL = ModelShape(
    name="small", model_type="llama", query_heads=8, kv_heads=4, head_dim=64, hidden_size=512,
    full_layers=2, windows=(100,), fixed_layers=0, parameters=500_000_000, kept_parameters=0,
)  # fmt: skip
DEVICE = Device("one", "One", 10e9, 1e12, "a test")  # 1 GB takes 1 ms


def measurement(model=SMALL, **fields):
    """A layer costs 1 ms + 1 us a token dense, 2 ms + .1 us sparse; weights come at 1 GB/s."""
    made = Measurement(
        device="a test", dtype=model.dtype, query_heads=model.query_heads, kv_heads=model.kv_heads,
        head_dim=model.head_dim, hidden_size=model.hidden_size, budget=1 / 16, bits=64,
        lists="per_query_head", weights_bandwidth=1e9, dense=Line(1e-3, 1e-6),
        sparse=Line(2e-3, 1e-7), timings=(Timing("dense", 4096, 0.005, 0.004, 0.006),), took=1.0,
    )  # fmt: skip
    return replace(made, **fields)
