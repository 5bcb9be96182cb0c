"""The published numbers: every row has a source, and the numbers agree with each other."""

import re

import pytest

from hashattn.base.errors import HashAttnError
from hashattn.evaluation.benchmarks.longbench import DATASETS, E_NAMES
from hashattn.reproduce.published.table import (
    COLUMNS,
    PaperError,
    cite,
    load_paper,
    paper_path,
)


@pytest.fixture(scope="module")
def paper():
    return load_paper()


@pytest.fixture
def altered(tmp_path):
    """altered(old, new): the path of a copy of paper.csv with one text exchanged, once."""

    def write(old, new):
        text = paper_path().read_text()
        assert old in text
        path = tmp_path / "paper.csv"
        path.write_text(text.replace(old, new, 1))
        return path

    return write


def averages(paper, table, **values):
    """(value of the average row, mean of the rows that it averages) by method."""
    rows = paper[paper["table"] == table]
    for column, value in values.items():
        rows = rows[rows[column] == value]
    for _, part in rows.groupby("method"):
        average = part[part["dataset"] == "average"].iloc[0]
        single = part[part["dataset"] != "average"]["value"]
        assert len(single) == average["datasets"]
        yield average["value"], single.mean()


def test_every_number_says_where_it_stands_and_how_we_know(paper):
    assert set(paper.columns) | {"id"} == COLUMNS
    assert (paper["source"].str.len() > 20).all() and (paper["verified"] != "").all()
    assert all(re.fullmatch(r"[a-z0-9_.-]+", id) for id in paper.index)
    assert {"Table 1", "Table 2", "Table 3", "Table 5", "Table 8"} <= set(paper["table"])
    own = paper[paper["table"].str.startswith("Table ")]
    assert set(own["verified"]) == {"quoted by a third party", "computed from published numbers"}


def test_scores_densities_and_names_are_possible(paper):
    scores = paper[paper["metric"] == "score"]["value"]
    assert scores.between(0, 100).all() and len(scores) > 400
    assert paper["density"].dropna().between(0, 1).all()
    assert (paper["density"].notna() & paper["heavy"].notna()).sum() == 0
    known = {*DATASETS, *E_NAMES}
    longbench = paper[paper["benchmark"].isin(["LongBench", "LongBench-E"])]["dataset"]
    assert {name for name in longbench if not name.startswith("average")} <= known


def test_the_hata_papers_averages_are_those_of_its_rows(paper):
    llama = {"model": "meta-llama/Llama-3.1-8B-Instruct"}
    checked = [
        *averages(paper, "HATA LongBench-E", **llama),
        *averages(paper, "HATA RULER", **llama),
    ]
    assert len(checked) == 16
    for published, mean in checked:
        assert published == pytest.approx(mean, abs=0.0051)


def test_differences_are_those_of_the_rows_they_subtract(paper):
    lines = paper[(paper["metric"] == "difference") & paper["verified"].str.startswith("computed")]
    assert len(lines) == 5
    for _, line in lines.iterrows():
        same = paper[(paper["table"] == line["table"]) & (paper["dataset"] == line["dataset"])]
        same = same[same["metric"] == "score"].set_index("method")["value"]
        expected = same[line["method"]] - same[line["minus"]]
        assert line["value"] == pytest.approx(expected, abs=1e-9)


def test_table_2_without_passage_count_tells_how_many_datasets_it_averages(paper):
    """That score follows from both averages and their number: with more datasets it is below 0."""

    def left_out(method, datasets):
        whole, without = (
            paper.loc[f"table2.{which}.{method}", "value"]
            for which in ("average", "without_passage_count")
        )
        return datasets * whole - (datasets - 1) * without

    rounding = 17 * 0.005 + 16 * 0.005
    assert left_out("hashattention_16x", 17) + rounding < 0
    for method in ("full", "hashattention_16x"):
        assert 0 < left_out(method, paper.loc["table2.average.full", "datasets"]) < 20


def test_error_ratios_are_those_of_the_curves(paper):
    rows = paper[(paper["table"] == "output error plot") & (paper["metric"] == "output error")]
    curves = rows.set_index(["dataset", "density", "method"])["value"].unstack().dropna()
    ratios = curves["HashAttention"] / curves["oracle top-k"]
    assert len(ratios) == 12
    for end, value in (("lowest", ratios.min()), ("highest", ratios.max())):
        published = paper.loc[f"output_error.hashattention_over_oracle.{end}", "value"]
        assert published == pytest.approx(value, abs=0.005)


def test_numbers_are_cited_from_the_table(paper):
    assert cite("table2.average.hashattention_16x_minus_full") == "-0.78, Table 2"
    assert cite("table1.hashattention_minus_quest") == "+0.82, Table 1"
    assert cite("table8.lsh_bits") == "> 1000, Table 8"
    ends = ("abstract.latency_over_gpt_fast", "abstract.latency_over_flash_decode")
    assert cite(*ends) == "2.54 to 4.3, abstract"
    changed = paper.copy()
    changed.loc["table1.quest", "value"] = 12.5
    assert cite("table1.quest", paper=changed) == "12.5, Table 1"


def test_what_cannot_be_cited_is_refused():
    with pytest.raises(PaperError, match="called 'table2.avarage.full'.*'table2.average.full'"):
        cite("table2.avarage.full")
    with pytest.raises(PaperError, match=r"of tables \['Table 1', 'Table 8'\]"):
        cite("table1.quest", "table8.lsh_bits")
    with pytest.raises(PaperError, match="ids of one table"):
        cite()


ROW = "table1.quest,Table 1,LongBench"
VALUE = ",score,=,63.33,"


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("id,table,", "id,chart,", r"columns \['chart', 'table'\] are missing or unknown"),
        (ROW, "table1.h2o,Table 1,LongBench", r"\(table1.h2o\): an id that another row has"),
        (ROW, ",Table 1,LongBench", r"row 2 \(no id\): no id"),
        (VALUE, ",score,=,high,", r"row 2 \(table1.quest\): value that is not a number"),
        (VALUE, ",score,=,,", r"row 2 \(table1.quest\): value that is not a number"),
        (VALUE, ",score,~,63.33,", r"\(table1.quest\): relation not one of"),
        (VALUE, ",difference,=,63.33,", r"\(table1.quest\): minus without metric"),
        (",64,64,,512,", ",64,64,,many,", r"\(table1.quest\): heavy that is not a number"),
        (",authors,B,", ",authors,C,", r"\(table1.hashattention\): setup not one of"),
        ("quoted by a third party", "surely", r"verified not one of \['read in the source'"),
        ("quoted by a third party", "", "no verified: every row needs one"),
        ('"HashAttention (ICML 2025, arXiv 2412.14468v2), Table 1; by reading notes in '
         'github.com/hustzxd/EfficientPaper"', "", r"row 1 \(table1.hashattention\): no source"),
        (VALUE, ",score,=,63.33,,,,", "is not a table"),
    ],
)  # fmt: skip
def test_a_damaged_table_is_refused(altered, old, new, message):
    with pytest.raises(PaperError, match=message) as error:
        load_paper(altered(old, new))
    assert isinstance(error.value, HashAttnError)


def test_an_absent_table_says_how_to_get_it_back(tmp_path):
    with pytest.raises(PaperError, match="git checkout -- data/reference"):
        load_paper(tmp_path / "paper.csv")
