"""Bias and variance of what is drawn, where both are known."""

import pytest
import torch

from hashattn.evaluation.measures.drawing import drawing_errors
from hashattn.evaluation.measures.selection import selection_metrics
from hashattn.hashing.capture import CapturedLayer
from hashattn.selectors import fit_slopes, make_selector

WINDOW = dict(sink=2, local=4)


def captured(seed: int = 0, values: bool = True) -> CapturedLayer:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randn(h, n, 16, generator=generator) for h, n in ((4, 6), (2, 300)))
    positions = torch.arange(294, 300)
    own = keys if values else None  # the best tokens have values of a kind: by rank there is bias
    return CapturedLayer(1, queries, positions, keys, scaling=0.5, values=own)


def lines(selectors, heavy=(40,), draws=48, **changes):
    found = drawing_errors([captured()], selectors, heavy, draws=draws, **WINDOW, **changes)
    return {(row["method"], row["sampled"]): row for row in found}


def test_ranked_tokens_have_no_variance_and_the_error_that_selection_metrics_knows():
    layer, oracle = captured(), make_selector("oracle")
    row = lines({"oracle": oracle})["oracle", 0.0]
    assert row["variance"] == 0 and row["squared_bias"] == row["squared_error"] > 0
    # a mean of squares is at least the square of the mean
    mean = selection_metrics([layer], {"o": oracle}, [40], **WINDOW)[0]["output_error"]
    assert mean**2 < row["squared_error"] < 2 * mean**2


def test_a_draw_by_exact_logits_trades_bias_for_variance():
    ranked, drawn = (lines({"oracle": make_selector("oracle")})["oracle", s] for s in (0.0, 0.5))
    assert drawn["squared_error"] < ranked["squared_error"] / 2
    assert abs(drawn["squared_bias"]) < 0.1 * drawn["variance"]
    total = drawn["squared_bias"] + drawn["variance"]
    assert total == pytest.approx(drawn["squared_error"])


def test_all_of_the_candidates_leave_no_error():
    row = lines({"oracle": make_selector("oracle")}, heavy=(294,))["oracle", 0.5]
    assert row["squared_error"] < 1e-9 and row["variance"] < 1e-9


def test_methods_that_only_rank_are_ranked_and_fitted_ones_are_drawn():
    lsh = make_selector("lsh", bits=64)
    assert set(lines({"lsh": lsh}, draws=2)) == {("lsh", 0.0)}
    fitted = fit_slopes(lsh, [captured(1)], **WINDOW)
    assert set(lines({"lsh": fitted}, draws=2, sampled=(0, 1.0))) == {("lsh", 0), ("lsh", 1.0)}


@pytest.mark.parametrize("name, settings", [
    ("magicpig", {"bits": 2, "tables": 12}), ("residual", {"base": make_selector("oracle")}),
])  # fmt: skip
def test_methods_that_sample_by_themselves_vary_with_their_seed(name, settings):
    found = drawing_errors([captured()], {name: make_selector(name, **settings)}, [40], draws=8,
                           **WINDOW)  # fmt: skip
    assert len(found) == 1 and found[0]["sampled"] != found[0]["sampled"]  # NaN
    assert found[0]["variance"] > 0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="draws = 1: must be an integer of at least 2"):
        lines({"oracle": make_selector("oracle")}, draws=1)
    with pytest.raises(ValueError, match="captured = 'layer 1 without values': .*values=True"):
        drawing_errors([captured(values=False)], {"oracle": make_selector("oracle")}, [40])
