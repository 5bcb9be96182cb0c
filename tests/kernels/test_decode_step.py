"""A decode step in one call: against its parts, against the reference, at the edges."""

import pytest
import torch

from hashattn import kernels
from hashattn.kernels import Coins, Drawing, Grades, Maps, available, layout_for
from hashattn_kernels import numba_cpu
from hashattn_kernels.step import composed
from kernel_inputs import BACKENDS

SINK, LOCAL = 4, 6
FINE, WIDE = Grades(5, 255), Grades(6, 1023)


def maps(heads: int, inputs: int, bits: int, folds: int = 0, half: bool = True) -> Maps:
    steps = torch.rand(heads, folds, bits) * 0.3 if folds else None
    made = Maps(
        (torch.randn(heads, inputs, bits) / inputs**0.5,), (torch.randn(heads, bits) * 0.1,),
        steps=steps,
    )  # fmt: skip
    return made.rounded() if half else made


class Step:
    """One layer's cache of n tokens, the newest of which has no code yet."""

    def __init__(
        self, n: int = 90, batch: int = 1, heads: int = 8, kv_heads: int = 2, code_heads: int = 2,
        dim: int = 64, bits: int = 32, folds: int = 3, dtype: torch.dtype = torch.float32,
        value_dim: int | None = None, half: bool = True,
    ) -> None:  # fmt: skip
        torch.manual_seed(n + bits)
        if value_dim is None:
            pairs = torch.randn(batch, kv_heads, n, 2, dim).to(dtype)
            self.k, self.v = pairs.unbind(3)
        else:
            self.k = torch.randn(batch, kv_heads, n, dim).to(dtype)
            self.v = torch.randn(batch, kv_heads, n, value_dim).to(dtype)
        self.q = torch.randn(batch, heads, 1, dim).to(dtype)
        self.query_maps = maps(heads, dim, bits, half=half)
        self.key_maps = maps(code_heads, dim, bits, folds, half=half)
        self.before = kernels.encode(self.k[:, :, : n - 1], self.key_maps)
        self.n, self.batch = n, batch
        self.spans = torch.tensor([[0, n]]).repeat(batch, 1, 1)

    def arguments(self, lists: int, grades: Grades | None, heavy: int = 12, draw: bool = False):
        drawing = None
        if draw:
            slopes = 0.01 + 0.05 * torch.rand(lists)
            drawing = Drawing(slopes, torch.full((self.batch, 1, 1), 7), 0.1, Coins(5, 3))
        return {
            "heavy": torch.full((self.batch, 1, 1), heavy), "spans": self.spans, "sink": SINK,
            "local": LOCAL, "width": min(self.n, SINK + LOCAL + heavy + (40 if draw else 0)),
            "lists": lists, "scaling": 0.2, "grades": grades, "drawing": drawing,
        }  # fmt: skip

    def run(self, call, **arguments):
        """Output, indices, log weights, and the codes afterwards."""
        codes = layout_for(torch.device("cpu")).from_tokens(self.before)
        found = call(self.q, self.k, self.v, codes, self.query_maps, self.key_maps, **arguments)
        return *found, codes.to_tokens()


def same(found, expected) -> bool:
    return all(
        b is None if a is None else torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )


@pytest.fixture
def at_once(monkeypatch):
    """Fails where the step does not run in one region."""
    if not available("numba"):
        pytest.skip("numba is not installed")
    fused = numba_cpu.decode_step

    def checked(*arguments, **keywords):
        result = fused(*arguments, **keywords)
        assert result is not None, "the step fell back to its parts"
        return result

    monkeypatch.setattr(numba_cpu, "decode_step", checked)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a list may be the only one
    yield
    torch.set_num_threads(before)


SHAPES = {
    "one list a KV head": ({}, 2, FINE),
    "one list a query head": ({}, 8, FINE),
    "matching bits": ({}, 2, None),
    "matching bits, one list a query head": ({}, 8, None),
    "code per query head": ({"code_heads": 8}, 8, FINE),
    "batch with padding": ({"batch": 3}, 8, FINE),
    "64 bits, bfloat16": ({"bits": 64, "dtype": torch.bfloat16}, 8, FINE),
    "128 bits, two bytes a level": ({"bits": 128}, 2, WIDE),
    "groups of three, other width of V": ({"heads": 6, "value_dim": 32}, 2, FINE),
    "maps in float32, no folds": ({"half": False, "folds": 0}, 8, FINE),
    "one KV head": ({"kv_heads": 1, "code_heads": 1}, 1, FINE),
}


@pytest.mark.parametrize("draw", [False, True], ids=["ranked", "drawn"])
@pytest.mark.parametrize("name", SHAPES)
def test_one_call_is_its_parts_bit_for_bit(name, draw, at_once):
    shape, lists, grades = SHAPES[name]
    if draw and grades is None:
        pytest.skip("bits that are counted estimate no logits")
    step = Step(**shape)
    if step.batch > 1:
        step.spans[1, 0, 0], step.spans[2, 0] = 30, torch.tensor([step.n - 3, step.n])
    arguments = step.arguments(lists, grades, draw=draw)
    assert same(step.run(kernels.decode_step, **arguments), step.run(composed, **arguments))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lists", [2, 8])
def test_every_backend_reads_what_the_reference_reads(backend, lists):
    step = Step()
    arguments = step.arguments(lists, FINE)
    out, indices, _, codes = step.run(kernels.decode_step, backend=backend, **arguments)
    expected = step.run(composed, backend="reference", **arguments)
    assert torch.equal(codes, expected[3]) and torch.equal(indices, expected[1])
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-5)


def by_hand(step: Step, lists: int, heavy: int) -> list[list[int]]:
    """The lists of a step of one sequence, by the definition, in Python."""
    before = kernels.unpack_bits(step.before, step.query_maps.bits).int()[0]
    signs = [[[2 * bit - 1 for bit in token] for token in head] for head in before.tolist()]
    pre = torch.einsum("hd,hdb->hb", step.q[0, :, 0], step.query_maps.weights[0])
    pre = (pre + step.query_maps.biases[0]).unflatten(0, (lists, -1)).sum(1)
    graded = kernels.grade_bits(pre, *FINE, backend="reference")
    chosen = []
    for line in range(lists):
        bits = [kernels.unpack_bits(graded[line, :, p], pre.shape[1]).tolist() for p in range(6)]
        weights = [sum(bits[1 + p][i] << p for p in range(5)) for i in range(pre.shape[1])]
        ones = [1 if bit else -1 for bit in bits[0]]
        head = signs[line * len(signs) // lists]
        others = range(SINK, step.n - LOCAL)
        scores = {
            token: sum(w for w, s, o in zip(weights, head[token], ones, strict=True) if s == o)
            for token in others
        }
        best = sorted(others, key=lambda token: (-scores[token], token))[:heavy]
        chosen.append([*range(SINK), *sorted(best), *range(step.n - LOCAL, step.n)])
    return chosen


@pytest.mark.parametrize("lists", [2, 8])
def test_lists_are_the_best_by_weighted_bits(lists, at_once):
    step = Step(n=60)
    _, indices, _, _ = step.run(kernels.decode_step, **step.arguments(lists, FINE, heavy=9))
    assert indices[0, :, 0].tolist() == by_hand(step, lists, 9)


def test_the_output_is_attention_to_the_lists(at_once):
    step = Step(n=80, batch=2)
    out, indices, log_weights, _ = step.run(
        kernels.decode_step, **step.arguments(8, FINE, draw=True)
    )
    for item in range(2):
        for head in range(8):
            tokens = indices[item, head, 0]
            tokens = tokens[tokens >= 0].long()
            key, value = step.k[item, head // 4, tokens], step.v[item, head // 4, tokens]
            logits = key.double() @ step.q[item, head, 0].double() * 0.2
            logits += log_weights[item, head, 0, : len(tokens)]
            expected = logits.softmax(0) @ value.double()
            torch.testing.assert_close(out[item, head, 0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [2, 9, 10, 11, 64, 65, 4200])
@pytest.mark.parametrize("draw", [False, True], ids=["ranked", "drawn"])
def test_short_and_long_caches(n, draw, at_once):
    step = Step(n=n, heads=4)
    for heavy in (0, 12):
        arguments = step.arguments(4, FINE, heavy=max(heavy, 7 if draw else 0), draw=draw)
        found, expected = (step.run(call, **arguments) for call in (kernels.decode_step, composed))
        assert same(found, expected)
        assert found[3].shape[2] == n


def test_a_row_that_sees_nothing_gives_zeros(at_once):
    step = Step(batch=2)
    step.spans[1, 0] = 0
    out, indices, _, _ = step.run(kernels.decode_step, **step.arguments(2, FINE))
    assert not out[1].any() and (indices[1] == -1).all() and out[0].any()


def test_what_one_region_cannot_do_its_parts_do():
    step = Step()
    arguments = step.arguments(8, FINE)
    sinks = torch.randn(8)
    assert same(step.run(kernels.decode_step, sinks=sinks, **arguments),
                step.run(composed, sinks=sinks, **arguments))  # fmt: skip
    other = maps(8, 64, 32, half=False)  # weights of another type than the keys'
    step.query_maps = other
    assert same(step.run(kernels.decode_step, **arguments), step.run(composed, **arguments))


def test_steps_follow_each_other(at_once):
    step = Step(n=300)
    codes = layout_for(torch.device("cpu")).from_tokens(step.before[:, :, :200])
    arguments = step.arguments(2, FINE)
    for n in range(201, 301):
        spans = torch.tensor([[[0, n]]])
        kernels.decode_step(
            step.q, step.k[:, :, :n], step.v[:, :, :n], codes, step.query_maps, step.key_maps,
            **arguments | {"spans": spans},
        )  # fmt: skip
    assert torch.equal(codes.to_tokens()[:, :, :299], step.before)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads, at_once):
    step = Step(n=200, batch=2)
    arguments = step.arguments(8, FINE, draw=True)
    expected = step.run(composed, **arguments)
    torch.set_num_threads(threads)
    assert same(step.run(kernels.decode_step, **arguments), expected)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("call", [kernels.decode_step, composed])
def test_a_newest_token_that_is_not_finite_is_refused(call, part, number):
    step = Step()
    getattr(step, part)[0, 1, -1, 5] = number
    codes = layout_for(torch.device("cpu")).from_tokens(step.before)
    arguments = step.arguments(8, FINE)
    with pytest.raises(FloatingPointError, match="newest token"):
        call(step.q, step.k, step.v, codes, step.query_maps, step.key_maps, **arguments)
    assert codes.length == step.n - 1


def refused(step: Step, match: str, **changes: object) -> None:
    arguments = step.arguments(8, FINE) | changes
    with pytest.raises(ValueError, match=match):
        step.run(kernels.decode_step, **arguments)


def test_bad_input_is_refused():
    step = Step()
    refused(step, "lists", lists=3)
    refused(step, "spans", spans=torch.zeros(1, 2, dtype=torch.int64))
    refused(step, "heavy", heavy=torch.ones(1, 3, 1, dtype=torch.int64))
    refused(step, "heavy", heavy=torch.ones(1, 1, 1))
    refused(step, "grades", grades=None, drawing=step.arguments(8, FINE, draw=True)["drawing"])
    drawing = step.arguments(8, FINE, draw=True)["drawing"]
    refused(
        step,
        "slopes: expected .* torch.float32",
        drawing=drawing._replace(slopes=drawing.slopes.double()),
    )
    refused(step, "planes", grades=Grades(9, 255))
    step.q = step.q.expand(-1, -1, 2, -1)
    refused(step, "rows")
    step = Step()
    step.k, step.v = step.k[:, :, :-1], step.v[:, :, :-1]
    refused(step, "89 tokens")


def test_a_unit_of_weight_costs_at_least_one():
    steps = torch.tensor([[[0.0], [0.5]]])
    units = kernels.units_of(steps, torch.tensor([1.0, 0.25]))
    assert units.tolist() == [[[1], [2048 // 4]]]
