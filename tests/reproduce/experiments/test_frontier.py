"""Notebook 02's frontier: contenders, rows, verdicts and statements against differences by hand."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from hashattn.base.engines.processes import Processes
from hashattn.hashing import HashWeights
from hashattn.reproduce.access import load_model
from hashattn.reproduce.experiments import common as experiments
from hashattn.reproduce.experiments import contenders
from hashattn.reproduce.experiments import frontier as frontiers
from hashattn.reproduce.experiments.contenders import product_codes, quest_pages
from hashattn.reproduce.experiments.frontier import (
    at_memory,
    bit_lines,
    budget_shares,
    by_bits,
    by_head,
    by_length,
    counts,
    error_lines,
    exceptions,
    first_layer_dense,
    frontier,
    losses,
    summary,
    task_verdicts,
    verdicts,
)
from hashattn.reproduce.profiles import load_profile
from hashattn.selectors.quest import QuestSelector


@pytest.fixture(scope="module")
def profile():
    return replace(load_profile("tiny"), memory=(32, 128), lengths=(2048, 4096))


@pytest.fixture(scope="module")
def loaded(profile):
    return load_model(profile)


@pytest.fixture(scope="module")
def codes(profile, loaded):
    weights = HashWeights.load(profile.hash_weights_path, loaded[0])
    return contenders.our_codes(profile, *loaded, weights)


@pytest.fixture(scope="module")
def rows(profile, loaded, codes):
    calibrated = experiments.captured(profile, *loaded, 512, 1, split="train")
    chosen = contenders.oracles() | contenders.hash_selectors(codes)
    chosen |= contenders.other_methods(profile, calibrated)
    return frontier(profile, *loaded, chosen, [1024], [1 / 4, 1 / 8])


def test_methods_store_what_they_are_compared_at(rows):
    bits = rows.groupby("method")["bits"].first()
    assert bits["hash 32 bits"] == bits["lsh 32 bits"] == bits["socket 32 bits"] == 32
    assert bits["hash 128 bits"] == bits["hash official"] == bits["quest page 16, 16 bits"] == 128
    assert bits["double_sparsity 32 channels"] == bits["loki 32 components"] == 128
    assert bits["rabitq 2 bit a channel"] == bits["lsh best 128 bits"] == 128
    assert bits["rabitq 2 bit a channel, factor"] == 144
    assert bits["hata 128 bits"] == 128 and bits["pqcache official"] == 12
    assert bits["quest page 16, 4 bits"] == bits["quest page 8, 2 bits"] == 32
    assert bits["pqcache 16 parts of 6 bits"] == 96  # and 32 for its centroids at 2K tokens


def test_budgets_are_densities_and_the_oracle_is_best(rows):
    found = rows.groupby("budget")["density"].mean()
    assert found[1 / 4] == pytest.approx(1 / 4, rel=0.05)
    assert found[1 / 8] == pytest.approx(1 / 8, rel=0.05)
    union = rows.groupby("method")[["density", "union"]].mean()
    assert (union["union"] >= union["density"] - 1e-6).all()
    shared = union.loc["oracle per group"]
    assert shared["union"] == pytest.approx(shared["density"])
    table = summary(rows)
    assert list(table.columns) == ["1/4", "1/8"]
    errors = table.droplevel("bits")["1/8"]
    assert errors["oracle"] < errors["hash 128 bits"] < errors["hash 32 bits"]
    assert errors["hash 32 bits"] < errors["lsh 32 bits"] and errors.max() < 1.5


def test_processes_measure_the_same(profile, loaded, monkeypatch):
    chosen, started = contenders.oracles(), []

    def two(jobs, job_bytes, device):
        started.append(jobs)
        return Processes(2)

    arguments = (profile, *loaded, chosen, [512, 1024], [1 / 4])
    here = frontier(*arguments)
    monkeypatch.setattr(frontiers, "spread", two)
    monkeypatch.setattr(frontiers, "_WORTH_PROCESSES", 1536 * profile.sequences * len(chosen))
    there = frontier(*arguments)
    assert started == [2 * profile.sequences]
    pd.testing.assert_frame_equal(here, there, atol=1e-5)


def test_every_trick_pays_where_it_should(profile, loaded, codes):
    weights = codes["hash 32 bits"]
    chosen = contenders.oracles() | contenders.tricks(weights, codes["hash signs"], seed=0)
    found = frontier(profile, *loaded, chosen, [1024], [1 / 8])
    error = summary(found).droplevel("bits")["1/8"]
    assert error["hash digits, real query"] == pytest.approx(error["hash digits"], rel=0.05)
    assert error["hash signs graded"] < error["hash signs by bits"]
    assert error["hash re-ranked 4x"] < error["hash re-ranked 2x"] < error["hash digits"]
    assert error["oracle"] < error["hash re-ranked 4x"]
    calibrated = experiments.calibration(profile, *loaded)
    shares = budget_shares(profile, calibrated, chosen["hash digits"], 1 / 8)
    assert sum(map(sum, shares)) == pytest.approx(8)
    moved = frontier(
        profile, *loaded, {"hash digits": chosen["hash digits"]}, [1024], [1 / 8], shares
    )
    own = found[found.method == "hash digits"]
    assert moved["density"].mean() == pytest.approx(own["density"].mean(), rel=0.02)
    assert moved["output_error"].mean() < own["output_error"].mean()


def test_figures_and_tables_of_the_rows(rows):
    from matplotlib import pyplot as plt

    table = summary(rows)
    names = at_memory(table, 128)
    assert names[:3] == ["oracle", "hash 128 bits", "hash official"]
    assert {name.split()[0] for name in names} == {
        "oracle", "hash", "transform", "lsh", "rabitq", "hata", "socket", "quest", "pqcache",
        "double_sparsity", "loki",
    }  # fmt: skip
    assert at_memory(table, 32)[:2] == ["oracle", "hash 32 bits"]
    figure, axis = plt.subplots()
    error_lines(axis, table, names)
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axis.lines}
    assert len(styles) == len(names)
    plt.close(figure)
    heads = by_head(rows, "hash 32 bits", 1 / 8)
    bound = by_head(rows, "oracle", 1 / 8)
    assert heads.shape == (4, 2) and (heads >= bound).all(axis=None)
    dense = first_layer_dense(rows, "hash 32 bits").loc["1/8"]
    assert dense["first layer dense", "density"] > dense["as it is", "density"] + 0.2


def line(method, bits, error, **here):
    return here | {"method": method, "bits": bits, "output_error": error, "heavy_mass": 0.5}


def planted():
    """Two sequences of two layers: always better, always worse, and both."""
    lines = []
    for sequence in range(2):
        for layer in range(2):
            here = {"sequence": sequence, "layer": layer, "head": 0, "context": 1024,
                    "budget": 1 / 8}  # fmt: skip
            base, sign = 0.1 * (1 + layer), 1 if sequence else -1
            lines += [
                line("hash 32 bits", 32, base, **here),
                line("quest", 32, base + 0.02, **here),
                line("lsh", 64, base - 0.03, **here),
                line("magicpig", 32, base + sign * 0.04, **here),
                line("random", 0, 0.0, **here),
                line("oracle", 0, 0.01, **here),
                line("hash 64 bits", 64, 0.0, **here),
            ]
    return pd.DataFrame(lines)


def test_verdicts_by_hand():
    table = verdicts(planted(), "hash 32 bits").set_index("method")
    assert table.verdict.to_dict() == {  # not the own family, nor oracles
        "quest": "better", "lsh": "worse", "magicpig": "not distinguishable", "random": "worse",
    }  # fmt: skip
    assert table.as_many_bits.to_dict() == {
        "quest": True, "lsh": True, "magicpig": True, "random": False,
    }  # fmt: skip
    assert table.difference["lsh"] == pytest.approx(0.03)
    assert table.low["lsh"] <= 0.03 <= table.high["lsh"]
    found = counts(table.reset_index())
    assert found.loc[(64, "lsh")].tolist() == [0, 0, 1]


@pytest.mark.parametrize(("sequences", "verdict"), [(7, "better"), (8, "not distinguishable")])
def test_with_enough_sequences_verdicts_are_over_whole_ones(sequences, verdict):
    """All heads of a sequence are worse by as much: how many heads there are proves nothing."""
    differences = [0.3, *[-0.01] * (sequences - 1)]  # of the mean: all of it from one sequence
    lines = [
        line(method, 32, 0.5 + gap, sequence=sequence, layer=layer, head=head, context=1024,
             budget=1 / 8)
        for sequence, difference in enumerate(differences)
        for layer in range(30)
        for head in range(8)
        for method, gap in (("hash 32 bits", 0.0), ("lsh", difference))
    ]  # fmt: skip
    table = verdicts(pd.DataFrame(lines), "hash 32 bits")
    assert table.verdict.tolist() == [verdict]


def test_means_of_each_length_stand_alone():
    both = pd.concat([planted(), planted().assign(context=2048, output_error=0.5)])
    table = by_length(both)
    assert table.loc[(1024, "hash 32 bits", 32), "1/8"] == pytest.approx(0.15)
    assert (table.loc[2048, "1/8"] == 0.5).all()
    assert summary(both).loc[("hash 32 bits", 32), "1/8"] == pytest.approx((0.15 + 0.5) / 2)


def test_error_by_bits_has_its_interval_over_sequences():
    table = by_bits(planted(), 1 / 8)
    ours = table.loc[(1024, "hash 32 bits", 32)]
    assert ours["sequences"] == 2 and ours["output_error"] == pytest.approx(0.15)
    assert ours["low"] == ours["high"] == pytest.approx(0.15)  # both sequences alike
    other = table.loc[(1024, "magicpig", 32)]
    assert (other["low"], other["high"]) == pytest.approx((0.11, 0.19))


def test_lines_over_bits_are_of_the_best_of_each_family_and_size():
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots()
    bit_lines(axis, by_bits(planted(), 1 / 8).loc[1024])
    drawn = {line.get_label(): list(line.get_xdata()) for line in axis.lines}
    assert drawn["HashAttention"] == [32, 64] and drawn["LSH"] == [64]
    assert len(drawn) == 5 and "oracle (exact q.k)" in drawn  # random stores nothing
    plt.close(figure)


def test_exceptions_name_every_place_once():
    rows = pd.concat([planted(), planted().assign(context=8192, budget=1 / 64)])
    table = pd.concat({"ours": verdicts(rows, "hash 32 bits")}, names=["codes"]).reset_index(
        "codes"
    )
    found = exceptions(table)
    assert found.loc[("ours", "lsh", 64)].tolist() == ["1K 1/8, 8K 1/64", ""]
    assert found.loc[("ours", "magicpig", 32)].tolist() == ["", "1K 1/8, 8K 1/64"]
    assert len(found) == 2  # quest is beaten, random stores less
    again = table.assign(context=1024)
    assert exceptions(again).loc[("ours", "lsh", 64), "worse"] == "1K 1/8 1/64"
    assert exceptions(table[table.method == "quest"]).empty


def test_losses_are_stated_from_the_records():
    rows = planted()
    text = losses(rows, {"hash 32 bits": verdicts(rows, "hash 32 bits")}, "hash 32 bits")
    assert "better in 1 of 3 comparisons with methods of as many bits or more and 0 of 1 " in text
    assert "lsh (64 bits): worse in 1 (1K 1/8), error up to 1.25 times theirs" in text
    assert "magicpig (32 bits): not distinguishable in 1" in text
    assert "from 0.150 at 1/8 (oracle 0.010) to 0.150 at 1/8" in text
    assert "quest" not in text


def test_task_verdicts_by_hand():
    """Two datasets of different sizes: their means count the same."""
    lines = []
    for number in range(12):
        dataset = "a" if number < 4 else "b"
        here = {"sample": str(number), "context": str(number), "dataset": dataset,
                "protocol": "p", "protocol_fields": {"question": "sparse"}}  # fmt: skip
        for method, bits, score in (
            ("hash", 32, 1.0), ("quest", 128, float(dataset == "b")), ("lsh", 32, 1.0),
            ("window", 0, 0.0), ("oracle", 0, 1.0), ("hash_128", 128, 1.0),
        ):  # fmt: skip
            lines.append(here | {"method": method, "nominal_bits": bits, "budget": "8x",
                                 "score": score})  # fmt: skip
    other = lines[0] | {"protocol": "q", "protocol_fields": {"question": "dense"}}
    with pytest.raises(ValueError, match="differ in question"):
        task_verdicts(pd.DataFrame([*lines, other]), "hash")
    table = task_verdicts(pd.DataFrame(lines), "hash").set_index("method")
    assert table.index.tolist() == ["quest", "lsh", "window"]
    assert table.as_many_bits.tolist() == [True, True, False]
    assert table.difference.tolist() == pytest.approx([50.0, 0.0, 100.0])
    assert table.verdict.tolist() == ["better", "not distinguishable", "better"]
    assert table.theirs.tolist() == pytest.approx([50.0, 100.0, 0.0])


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("bits", [32, 64, 128, 256])
def test_quest_has_the_size_it_is_compared_at(bits, head_dim):
    for page, bound in quest_pages(bits, head_dim):
        selector = QuestSelector(page, bound, grids={0: torch.zeros(1)})
        assert 0.8 * bits < selector.nominal_bits(4, head_dim) <= bits


def test_quest_pages_of_the_embedded_model_and_of_llama():
    found = {bits: quest_pages(bits, 64) for bits in (32, 64, 128, 256)}
    assert found == {
        32: [(16, 4), (8, 2)],
        64: [(8, 4), (4, 2)],
        128: [(16, 16), (4, 4), (2, 2)],
        256: [(8, 16), (2, 4)],
    }
    assert (16, 16) in quest_pages(256, 128)  # its authors' own


@pytest.mark.parametrize("tokens", [512, 4096, 131_072])
@pytest.mark.parametrize("bits", [32, 64, 128, 256])
def test_product_codes_store_the_most_that_fits_beside_their_centroids(bits, tokens):
    parts, code = product_codes(bits, 64, tokens)
    fits = [(p, c) for c in range(5, 9) for p in (1, 2, 4, 8, 16, 32, 64)
            if p * c + 2**c * 64 * 16 / tokens <= bits] or [(0, 0)]  # fmt: skip
    assert (parts, code) in fits
    assert parts * code == max(p * c for p, c in fits)
