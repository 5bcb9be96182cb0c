"""The paper's numbers beside ours: from made-up records, or the command that makes real ones."""

import json
import math
import shlex

import pytest

from hashattn.evaluation.benchmarks.longbench import DATASETS, LONGBENCH_E
from hashattn.reproduce import Claims
from hashattn.reproduce.profiles import METHODS, load_profile
from hashattn.reproduce.published.compare import (
    ABOVE,
    BELOW,
    NOT_RUN,
    WITHIN,
    compare_with_paper,
    judge,
    tolerance,
)
from hashattn.reproduce.published.measured import Measured, datasets_of, read_records
from hashattn.reproduce.published.runs import OUR_METHODS, RUNS, Run, command, run_of
from hashattn.reproduce.published.table import PaperError, load_paper

PROFILE = "llama-3.1-8b-authors"
FULL, HASH = "table2.average.full", "table2.average.hashattention_16x"
GAP = HASH + "_minus_full"
OTHER = {"protocol": "q", "protocol_fields": {"question": "sparse", "seed": 1}}


@pytest.fixture(scope="module")
def paper():
    return load_paper()


@pytest.fixture
def path(tmp_path):
    """Where the run of Table 2's profile leaves its records."""
    folder = tmp_path / PROFILE / "records"
    folder.mkdir(parents=True)
    return folder / f"length_{load_profile(PROFILE).frontier_length}.jsonl"


def lines(method, budget, score, *, samples=100, datasets=None, **fields):
    """evaluate()'s lines: in every dataset a share `score` of the samples is right."""
    return [
        {"key": f"{method} {name} {i}", "method": method, "budget": budget, "dataset": name,
         "sample": f"{name} {i}", "context": f"{name} {i}", "protocol": "p",
         "setup": "B", "protocol_fields": {"question": "sparse", "seed": 0},
         "nominal_bits": 128.0, "score": float(i < round(samples * score))} | fields
        for name in datasets or load_profile(PROFILE).tasks
        for i in range(samples)
    ]  # fmt: skip


def write(path, *parts):
    path.write_text("".join(json.dumps(row) + "\n" for part in parts for row in part))


def by_id(paper, tmp_path, *ids):
    table = compare_with_paper(paper.loc[list(ids)], tmp_path)
    return table.set_index(["id", "our_method"])


def test_a_run_fills_in_the_means_of_the_datasets_means(paper, tmp_path, path):
    most, *rest = load_profile(PROFILE).tasks
    write(path, lines("dense", "dense", 0.5, datasets=rest),
          lines("dense", "dense", 1.0, datasets=[most], samples=10),
          lines("hash", "16x", 0.2), lines("hash", "32x", 0.9),
          lines("hash_official", "16x", 0.9))  # fmt: skip
    found = by_id(paper, tmp_path, FULL, HASH)
    full = found.loc[FULL, "dense"]
    assert full["ours"] == pytest.approx(100 * (0.5 * len(rest) + 1.0) / (len(rest) + 1))
    assert full["difference"] == pytest.approx(full["ours"] - 48.78)
    assert full["samples"] == 100 * len(rest) + 10 and full["our_bits"] == 128
    assert [full["verdict"], found.loc[HASH, "hash"]["verdict"]] == [ABOVE, BELOW]
    assert found.loc[HASH, "hash"]["ours"] == pytest.approx(20)
    assert found.loc[HASH, "hash_official"]["verdict"] == ABOVE


def test_a_score_as_published_is_within_tolerance(paper, tmp_path, path):
    write(path, lines("dense", "dense", 0.49))
    line = by_id(paper, tmp_path, FULL).loc[FULL, "dense"]
    assert line["verdict"] == WITHIN and abs(line["difference"]) < line["tolerance"]
    write(path, lines("dense", "dense", 0.54))
    line = by_id(paper, tmp_path, FULL).loc[FULL, "dense"]
    assert line["verdict"] == ABOVE and line["difference"] > line["tolerance"]


def test_an_average_without_a_dataset_leaves_it_out(paper, tmp_path, path):
    id = "table2.without_passage_count.full"
    others = [t for t in load_profile(PROFILE).tasks if t != "passage_count"]
    write(path, lines("dense", "dense", 0.5, datasets=others),
          lines("dense", "dense", 0.0, datasets=["passage_count"]))  # fmt: skip
    assert by_id(paper, tmp_path, id).loc[id, "dense"]["ours"] == pytest.approx(50)
    assert by_id(paper, tmp_path, FULL).loc[FULL, "dense"]["ours"] == pytest.approx(50 * 15 / 16)


def test_differences_are_paired_by_sample(paper, tmp_path, path):
    write(path, lines("dense", "dense", 0.5), lines("hash", "16x", 0.49))
    line = by_id(paper, tmp_path, GAP).loc[GAP, "hash"]
    assert line["ours"] == pytest.approx(-1) and line["difference"] == pytest.approx(-0.22)
    # in each dataset one of 100 samples is lost: a variance of 0.01 (1 - 0.01) 100 / 99
    error = math.sqrt(0.01 * 0.99 / 99 / 16)
    assert line["tolerance"] == pytest.approx(100 * 2 * error) and line["verdict"] == WITHIN
    shuffled = lines("hash", "16x", 0.49)
    for row in shuffled:
        row["sample"] = row["sample"].replace(" 99", " 100")
    write(path, lines("dense", "dense", 0.5), shuffled)  # other samples: no pairs, no verdict
    assert by_id(paper, tmp_path, GAP).loc[GAP, "hash"]["verdict"] == NOT_RUN


def test_tolerances_come_from_the_published_number_and_the_samples(paper):
    row = paper.loc[FULL]
    worst = 2 * 100 * math.sqrt(0.4878 * (1 - 0.4878) / (16 * 175))
    assert tolerance(row) == pytest.approx(worst)
    assert tolerance(row, Measured(40, samples=(175,) * 16)) == pytest.approx(worst)
    assert tolerance(row, Measured(40, samples=(44,) * 16)) == pytest.approx(
        worst * math.sqrt(175 / 44)
    )
    assert math.isnan(tolerance(paper.loc["hata.longbench_e.llama.lcc.full"]))  # samples not known
    assert math.isnan(tolerance(paper.loc[GAP]))
    assert tolerance(paper.loc[GAP], Measured(0, error=0.3)) == pytest.approx(0.6)


@pytest.mark.parametrize(
    "id, ours, verdict",
    [
        ("table8.lsh_bits", 1024, WITHIN),
        ("table8.lsh_bits", 1000, BELOW),
        ("abstract_v1.hashattention_32x_minus_full", -0.6, WITHIN),
        ("abstract_v1.hashattention_32x_minus_full", -0.7, BELOW),
        ("abstract_v1.speed_over_lightllm.highest", 6.5, ABOVE),
    ],
)
def test_bounds_hold_or_do_not(paper, id, ours, verdict):
    assert judge(paper.loc[id], Measured(ours))["verdict"] == verdict


def test_a_claim_fills_in_what_is_no_score(paper, tmp_path):
    folder = tmp_path / "llama-3.1-8b"
    assert compare_with_paper(paper.loc[["table8.lsh_bits"]], tmp_path).verdict[0] == NOT_RUN
    notebook, text = run_of(paper.loc["table8.lsh_bits"]).claim
    Claims(notebook, folder).goal(text, 2048, low=256)
    line = compare_with_paper(paper.loc[["table8.lsh_bits"]], tmp_path).iloc[0]
    assert (line["ours"], line["verdict"]) == (2048, WITHIN)


def test_the_claims_that_fill_in_are_made_by_their_notebooks():
    from hashattn.reproduce.profiles import repository

    for run in RUNS:
        if run.claim:
            notebook, text = run.claim
            assert text in (repository() / "notebooks" / f"{notebook}.ipynb").read_text()


def test_a_missing_or_partial_run_shows_its_command(paper, tmp_path, path):
    line = by_id(paper, tmp_path, FULL).loc[FULL, "dense"]
    assert line["verdict"] == NOT_RUN and math.isnan(line["ours"]) and line["samples"] == 0
    assert line["run"] == (
        "HASHATTN_MODEL_DIR=/path/to/models HASHATTN_DATA_DIR=/path/to/LongBench "
        "make reproduce PROFILE=llama-3.1-8b-authors"
    )
    path.write_text("")
    assert by_id(paper, tmp_path, FULL).loc[FULL, "dense"]["verdict"] == NOT_RUN
    write(path, lines("dense", "dense", 0.5, datasets=load_profile(PROFILE).tasks[1:]))
    assert by_id(paper, tmp_path, FULL).loc[FULL, "dense"]["verdict"] == NOT_RUN


def test_every_number_has_a_profile_or_a_reason(paper):
    table = compare_with_paper(paper, "no such folder")
    assert set(table["id"]) == set(paper.index) and set(table["verdict"]) == {NOT_RUN}
    ready = table[table["run"].str.contains("make reproduce")]
    assert len(ready) > 20
    for text in set(ready["run"]):
        name = shlex.split(text)[-1].removeprefix("PROFILE=")
        assert load_profile(name).name == name and text == command(name)
    others = table[~table["run"].str.contains("make reproduce")]["run"]
    assert others.str.match("no profile yet: |a conclusion|counted").all()


def test_the_profiles_ask_what_the_rows_publish(paper):
    for id, row in paper.iterrows():
        run = run_of(row)
        if run.profile is None or run.claim:
            continue
        profile = load_profile(run.profile)
        assert profile.model == row["model"], id
        assert set(OUR_METHODS[row["method"]]) <= {*profile.methods}, id
        asked = datasets_of(row, profile)
        if row["benchmark"] == "RULER":
            assert set(asked) <= set(profile.ruler.tasks), id
            assert row["length"] in profile.ruler.lengths, id
            assert profile.ruler.samples == row["samples"], id
        else:
            assert set(asked) <= set(profile.tasks), id
        assert row["density"] == 1 or row["density"] in profile.densities, id
        if row["table"].startswith("Table"):
            assert len(asked) == row["datasets"] and profile.samples_per_task == row["samples"]
            assert (
                profile.benchmark == f"longbench_{row['protocol']}"
                and profile.prompt_limit == row["length"]
            )
            assert all(DATASETS[name].language != "zh" for name in asked)
    book = load_profile("llama-3.1-8b-longbench-e")
    assert {name.removesuffix("_e") for name in book.tasks} == set(LONGBENCH_E)


def test_ruler_rows_are_filled_from_the_records_of_their_length(paper, tmp_path):
    folder = tmp_path / "llama-3.1-8b-ruler" / "records"
    folder.mkdir(parents=True)
    write(folder / "length_16384.jsonl", lines("dense", "dense", 0.1, datasets=["qa_1"]))
    write(folder / "ruler_32768.jsonl", lines("dense", "dense", 0.84, datasets=["qa_1", "qa_2"]),
          lines("hash_official", "20x", 0.5, datasets=["qa_1"]))  # fmt: skip
    table = compare_with_paper(paper, tmp_path)
    filled = table[table.verdict != NOT_RUN].set_index(["id", "our_method"])
    assert set(filled["dataset"]) == {"qa_1", "qa_2"}
    dense = filled.loc[("skylight.full.qa_1", "dense")]
    assert (dense["ours"], dense["paper"], dense["verdict"]) == (84, 84, WITHIN)
    (ours,) = filled.xs("hash_official", level="our_method").itertuples()
    assert (ours.dataset, ours.budget, ours.ours, ours.verdict) == ("qa_1", "20x", 50, BELOW)
    skylight = table[table.table == "Skylight leaderboard"]
    commands = set(skylight[skylight.run.str.contains("make reproduce")]["run"])
    assert commands == {command("llama-3.1-8b-ruler")}


def test_our_methods_exist():
    from hashattn.reproduce.profiles import HASH_VARIANTS

    assert {m for names in OUR_METHODS.values() for m in names} <= {*METHODS, *HASH_VARIANTS}


def test_mixed_protocols_are_not_averaged(paper, tmp_path, path):
    first, *rest = load_profile(PROFILE).tasks
    write(path, lines("dense", "dense", 0.5, datasets=rest),
          lines("dense", "dense", 0.5, datasets=[first], **OTHER))  # fmt: skip
    with pytest.raises(PaperError, match=r"length_16384.jsonl: .*2 protocols.*seed: 0 or 1"):
        by_id(paper, tmp_path, FULL)
    write(path, lines("dense", "dense", 0.5, **OTHER), lines("hash", "16x", 0.5))
    assert by_id(paper, tmp_path, FULL).loc[FULL, "dense"]["ours"] == pytest.approx(50)
    with pytest.raises(PaperError, match="2 protocols"):
        by_id(paper, tmp_path, GAP)


def test_lines_that_do_not_name_their_protocol_do_not_count(paper, tmp_path, path):
    old = lines("dense", "dense", 0.5)
    for row in old:
        del row["protocol_fields"]
    write(path, old)
    assert by_id(paper, tmp_path, FULL).loc[FULL, "dense"]["verdict"] == NOT_RUN


def test_datasets_may_differ_in_how_they_are_asked_alone(paper, tmp_path, path):
    def told(method, budget, question, **changes):
        return [
            row for name in load_profile(PROFILE).tasks for row in lines(
                method, budget, 0.5, datasets=[name], protocol=f"{name} {question}",
                protocol_fields={"metric": name, "sink": 128, "question": question} | changes)
        ]  # fmt: skip

    write(path, told("dense", "dense", "dense"), told("hash", "16x", "sparse"))
    assert by_id(paper, tmp_path, GAP).loc[GAP, "hash"]["ours"] == pytest.approx(0)
    write(path, told("dense", "dense", "dense"), told("hash", "16x", "sparse", sink=4))
    with pytest.raises(PaperError, match="2 protocols"):
        by_id(paper, tmp_path, GAP)


def test_the_papers_setup_is_taken_where_records_name_one(paper, tmp_path, path):
    dense = [lines("dense", "dense", 0.5, setup=setup) for setup in "BA"]
    write(path, *dense, *(lines("hash", "16x", s, setup=t) for s, t in ((0.5, "B"), (0.9, "A"))))
    found = by_id(paper, tmp_path, FULL, HASH, GAP)
    assert found.loc[HASH, "hash"]["ours"] == pytest.approx(50)
    assert found.loc[FULL, "dense"]["ours"] == pytest.approx(50)
    assert found.loc[FULL, "dense"]["samples"] == 1600
    assert found.loc[GAP, "hash"]["ours"] == pytest.approx(0)
    # dense attention has but one setup, and may be kept under the other's name
    write(path, lines("hash", "16x", 0.5, setup="B"), lines("dense", "dense", 0.5, setup="A"))
    assert by_id(paper, tmp_path, GAP).loc[GAP, "hash"]["ours"] == pytest.approx(0)


def test_a_sample_that_was_scored_again_counts_once(paper, tmp_path, path):
    write(path, lines("dense", "dense", 0.1), lines("dense", "dense", 0.5))
    line = by_id(paper, tmp_path, FULL).loc[FULL, "dense"]
    assert line["ours"] == pytest.approx(50) and line["samples"] == 1600


def test_more_samples_than_the_paper_scored_are_refused(paper, tmp_path, path):
    write(path, lines("dense", "dense", 0.5, samples=176))
    with pytest.raises(PaperError, match="176 samples of .*scored its first 175"):
        by_id(paper, tmp_path, FULL)


def test_a_line_that_is_being_written_is_left_out_and_damage_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    assert read_records(path) is None
    good = json.dumps(lines("dense", "dense", 1, samples=1)[0])
    path.write_text(f"{good}\n{good[:20]}")
    assert len(read_records(path)) == 1
    path.write_text(f"{good[:20]}\n{good}\n")
    with pytest.raises(PaperError, match="records.jsonl:1 is not JSON"):
        read_records(path)


def test_results_are_read_where_the_environment_says(paper, monkeypatch, tmp_path, path):
    write(path, lines("dense", "dense", 0.5))
    monkeypatch.setenv("HASHATTN_RESULTS", str(tmp_path))
    monkeypatch.setenv("HASHATTN_PROFILE", "tiny")  # another profile than the one that has run
    assert compare_with_paper(paper.loc[[FULL]]).ours[0] == pytest.approx(50)
    monkeypatch.setenv("HASHATTN_RESULTS", str(tmp_path / "empty"))
    assert compare_with_paper(paper.loc[[FULL]]).verdict[0] == NOT_RUN


def test_a_row_that_nobody_thought_of_is_an_error(paper):
    row = paper.loc[FULL].copy()
    row["table"] = "Table 99"
    with pytest.raises(PaperError, match="add a profile or the reason"):
        run_of(row)
    with pytest.raises(PaperError, match="either a profile or a reason"):
        Run({"table": "Table 99"})


def test_commands_ask_for_folders_only_where_they_are_needed():
    assert command("embedded") == "make reproduce PROFILE=embedded"
    assert "MODEL_DIR" in command("mistral-7b") and "DATA_DIR" in command("mistral-7b")


def test_the_number_that_is_shown_is_the_tables(paper):
    shown = compare_with_paper(paper.loc[[FULL]], "nowhere")
    assert shown.paper[0] == paper.loc[FULL, "value"] == 48.78 and shown.unit[0] == "points"
