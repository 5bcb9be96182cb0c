"""decode_step on Triton, in few launches, against its parts one by one."""

import pytest
import torch

from hashattn.kernels import Coins, Drawing, Grades, Maps, decode_step, encode, new_counters
from hashattn_kernels.codes import Tiled
from hashattn_kernels.counters import count_step
from hashattn_kernels.step import composed
from hashattn_kernels.triton_gpu import backend, step
from kernel_inputs import normal, normal_maps
from on_device import GPU

N, HEADS, KV_HEADS, DIM = 150, 4, 2, 32
GRADES = Grades(5, 255)


def folded(maps: Maps) -> Maps:
    """The same maps, whose pre-activations are folded twice."""
    steps = torch.full((maps.heads, 2, maps.bits), 0.7, device=GPU)
    return Maps(maps.weights, maps.biases, maps.activation, steps)


def drawing(lists: int) -> Drawing:
    """A third of the heavy tokens."""
    drawn = torch.full((2, 1, 1), 10, dtype=torch.int64, device=GPU)
    slopes = torch.linspace(0.01, 0.9, lists, device=GPU)
    return Drawing(slopes, drawn, 0.1, Coins(seed=5, layer=2))


@pytest.mark.parametrize(
    ("lists", "key_heads", "options"),
    [
        (4, 2, {"grades": GRADES}),
        (2, 2, {"grades": GRADES}),
        (1, 1, {"grades": GRADES}),
        (2, 2, {}),
        (4, 2, {}),
        (4, 4, {"grades": GRADES}),
        (4, 2, {"grades": GRADES, "drawing": drawing(4)}),
        (2, 2, {"grades": GRADES, "drawing": drawing(2)}),
        (4, 2, {"grades": GRADES, "folds": True}),
        (4, 2, {"grades": GRADES, "unlike": True}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("known", [True, False], ids=["host", "device"])
def test_a_step_is_its_parts_bit_for_bit(lists, key_heads, options, known):
    """known: the host knows how many tokens there are; else the step reads it on the device."""
    kv_heads, options = min(KV_HEADS, key_heads), dict(options)
    query_maps, key_maps = normal_maps(HEADS, DIM, 16, 32), normal_maps(key_heads, DIM, 16, 32)
    if options.pop("unlike", False):
        key_maps = normal_maps(key_heads, DIM, 32)
    if options.pop("folds", False):
        key_maps = folded(key_maps)
    q, k, v = (normal(2, h, n, DIM, seed=h + n)
               for h, n in ((HEADS, 1), (kv_heads, N + 5), (kv_heads, N + 6)))  # fmt: skip
    before = Tiled.from_tokens(encode(k[:, :, : N - 1], key_maps, backend="triton"))
    given = dict(
        heavy=torch.tensor([[[30]], [[17]]], device=GPU), sink=2, local=3, width=60, lists=lists,
        spans=torch.tensor([[[0, N]], [[41, N]]], device=GPU), scaling=0.2,
    )  # fmt: skip
    given = given | {"grades": None, "drawing": None, "softcap": None, "sinks": None} | options
    codes = Tiled.over(before.room.clone(), N - 1)
    expected = composed(q, k, v, codes, query_maps, key_maps, backend="triton", **given)
    counters, counted = new_counters(GPU), new_counters(GPU)
    count_step(counted, given["spans"], expected[1], N, k[:, :, N - 1 : N], v[:, :, N - 1 : N])
    for _ in range(2):  # what is kept between calls is as it was
        if known:
            own, length = Tiled.over(before.room.clone(), N - 1), None
        else:
            own, length = Tiled.over(before.room.clone(), N + 5), torch.tensor(N, device=GPU)
        made = backend.decode_step(
            q, k, v, own, query_maps, key_maps, length=length, counters=counters, **given
        )
        for found, wanted in zip(made, expected, strict=True):
            assert found is wanted is None or torch.equal(found, wanted)
        stored = Tiled.over(own.room, N).to_tokens()
        assert torch.equal(stored, codes.to_tokens())
    counted[:4] *= 2
    assert torch.equal(counters, counted)


def test_memory_is_kept_until_it_is_too_small():
    q, v = (torch.zeros(1, 2, n, DIM, device=GPU) for n in (1, 9))
    stores = [Tiled.from_tokens(torch.zeros(1, 2, n, 1, dtype=torch.int32, device=GPU))
              for n in (9, 5000)]  # fmt: skip
    memory = {}

    def space(store, width, **options):
        return step.kept_space(q, v, store.room, 32, 2, width, GRADES, False, **options)

    small = space(stores[0], 10)
    assert small is space(stores[0], 20) and small.selection.done.tolist() == [0, 0]
    longer, wider = space(stores[1], 10), space(stores[1], 900)
    assert small is not longer is not wider is space(stores[0], 10)
    for store, width in ((stores[0], 10), (stores[1], 10), (stores[0], 10)):
        space(store, width, memory=memory)
    assert len(memory) == 2  # what a graph holds is not replaced


def test_what_no_kernel_holds_is_left_to_the_parts():
    """More levels than a histogram can count."""
    maps = normal_maps(2, DIM, 64)
    q, k, v = (normal(1, 2, n, DIM) for n in (1, 9, 9))
    given = dict(
        heavy=torch.tensor([[[3]]], device=GPU), sink=1, local=1, width=5, lists=2, scaling=0.2,
        spans=torch.tensor([[[0, 9]]], device=GPU), grades=Grades(8, 8000),
    )  # fmt: skip
    counters, counted = new_counters(GPU), new_counters(GPU)
    codes = Tiled.from_tokens(encode(k[:, :, :8], maps, backend="triton"))
    nothing = {"drawing": None, "softcap": None, "sinks": None, "counters": counters}
    assert backend.decode_step(q, k, v, codes, maps, maps, **given, **nothing) is None
    found = decode_step(q, k, v, codes, maps, maps, counters=counters, backend="triton", **given)
    count_step(counted, given["spans"], found[1], 9, k[:, :, 8:], v[:, :, 8:])
    assert codes.length == 9 and torch.equal(counters, counted)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of the interpreter
def test_numbers_that_are_not_finite_are_counted():
    maps = normal_maps(2, DIM, 32)
    q, k, v = (normal(1, 2, n, DIM) for n in (1, 9, 9))
    given = dict(
        heavy=torch.tensor([[[3]]], device=GPU), sink=1, local=1, width=5, lists=2, scaling=0.2,
        spans=torch.tensor([[[0, 9]]], device=GPU),
    )  # fmt: skip
    found = []
    for tensor, number in ((k, 0.0), (k, torch.inf), (v, torch.nan), (v, 1.0)):
        tensor[0, 1, 8, 3] = number
        counters = new_counters(GPU)
        codes = Tiled.from_tokens(encode(k[:, :, :8], maps, backend="triton"))
        decode_step(q, k, v, codes, maps, maps, counters=counters, backend="triton", **given)
        found.append(counters[-2:].tolist())
        tensor[0, 1, 8, 3] = 0.0
    assert found == [[0, 0], [1, 0], [1, 0], [0, 0]]
