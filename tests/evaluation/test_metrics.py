"""LongBench's metrics: by hand, against independent definitions, and against LongBench's own code.

The last needs a checkout of THUDM/LongBench and fuzzywuzzy (`pip install fuzzywuzzy`):
HASHATTN_LONGBENCH_DIR=<checkout>/LongBench pytest tests/evaluation/test_metrics.py
"""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from hashattn.evaluation.metrics import METRICS, first_line
from hashattn.evaluation.rouge import OVERFLOW, rouge_l_f

OFFICIAL = os.environ.get("HASHATTN_LONGBENCH_DIR")
CLASSES = ["food", "seafood", "food and drink", "animal"]


@pytest.mark.parametrize(
    ("prediction", "line"),
    [("a\nb", "a"), ("\n\na\nb", "a"), (" \na", " "), ("", ""), ("\n", ""), (" a ", " a ")],
)
def test_the_first_line_skips_only_line_breaks(prediction, line):
    assert first_line(prediction) == line


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "score"),
    [
        ("qa_f1", "The cat, sat!", ["a cat sat"], 1),
        ("qa_f1", "cat cat dog", ["bird", "cat cat bird"], 2 / 3),
        ("qa_f1", "the", ["the"], 0),  # articles alone leave no token to share
        ("qa_f1", "theatre", ["theatre"], 1),
        ("qa_f1_zh", "「红楼梦」。", ["红楼梦"], 1),
        ("qa_f1_zh", "《红楼梦》", ["红楼梦"], 2 / 3),  # "《" is not among LongBench's marks
        ("qa_f1_zh", "Hello，北京大学", ["hello 北京大学"], 1),
        ("qa_f1_zh", "。，", ["。，"], 0),
        ("rouge_l", "a b c d", ["a x c"], 2 * 0.5 * (2 / 3) / (0.5 + 2 / 3)),
        ("rouge_l", "b a", ["a b"], 0.5),
        ("rouge_l", "a a a b", ["a b"], 1),  # a word counts once
        ("rouge_l", "a. b", ["b. a"], 1),  # sentences match in any order
        ("rouge_l", "", ["a"], 0),
        ("rouge_l", "...", ["a"], 0),
        ("rouge_l", "A", ["a"], 0),
        ("rouge_zh", "北京大学", ["北京大学"], 1),
        ("rouge_zh", "我 来到 北京", ["我来到北京"], 1),  # spaces are no words
        (
            "rouge_zh",
            "我来到北京。",
            ["我来到北京"],
            2 * 0.75 / 1.75,
        ),  # marks are, "。" ends nothing
        ("retrieval", "Paragraph 3", ["Paragraph 3"], 1),
        ("retrieval", "3, or 4 of 13", ["Paragraph 3"], 1 / 3),
        ("retrieval", "three", ["Paragraph 3"], 0),
        ("retrieval", "03", ["Paragraph 3"], 0),
        ("retrieval_zh", "段落3和段落4", ["段落3"], 0.5),
        ("count", "5 of 15, so 5", ["5"], 2 / 3),
        ("count", "", ["5"], 0),
        ("code_sim", "return x", ["return x"], 1),
        ("code_sim", "```\n# no\n// no\nreturn x\nmore", ["return x"], 1),
        ("code_sim", "abcd", ["bcde"], 0.75),
        ("code_sim", "# only", ["x"], 0),
        ("code_sim", "", [""], 1),
        ("code_sim", "abx", ["abc"], 0.67),
        ("code_sim_levenshtein", "abx", ["abc"], 0.67),
        ("code_sim_levenshtein", "", ["a"], 0),
    ],
)
def test_scores_by_hand(metric, prediction, answers, score):
    assert METRICS[metric](prediction, answers) == pytest.approx(score, abs=2e-8)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("animal", "animal", 1),
        ("animal, food", "animal", 1 / 2),
        ("food", "animal", 0),
        ("", "animal", 0),
        ("food and drink", "food and drink", 1),  # "food" is a part of the answer: removed
        ("seafood", "seafood", 1),
        ("seafood", "food", 1 / 2),  # "seafood" is no part of the answer: stays
    ],
)
def test_classes_that_are_parts_of_the_answer_do_not_count(prediction, answer, score):
    assert METRICS["classification"](prediction, [answer], CLASSES) == score


def test_the_class_after_a_removed_one_is_kept():
    """LongBench removes from the list that it walks: "b", after "a", is never looked at."""
    assert METRICS["classification"]("abc", ["abc"], ["a", "b", "c", "abc"]) == 1 / 2
    assert METRICS["classification"]("abc", ["abc"], ["a", "abc", "b"]) == 1


def test_the_two_code_similarities_differ():
    """difflib takes the longest block first and looks beside it; its ratio has a direction."""
    similarity, levenshtein = METRICS["code_sim"], METRICS["code_sim_levenshtein"]
    assert similarity("axab", ["abxa"]) == 0.75  # block "xa", then "a" before it
    assert similarity("abxa", ["axab"]) == 0.5  # block "ab", then nothing
    assert levenshtein("axab", ["abxa"]) == levenshtein("abxa", ["axab"]) == 0.75


def test_what_a_metric_lacks_is_said():
    with pytest.raises(ValueError, match="all_classes = None"):
        METRICS["classification"]("food", ["food"])
    with pytest.raises(ValueError, match="'Paragraph <number>'"):
        METRICS["retrieval"]("3", ["3"])
    with pytest.raises(ValueError, match="段落"):
        METRICS["retrieval_zh"]("3", ["Paragraph 3"])


def words(generator, count):
    vocabulary = ["cat", "dog", "The", "ran", ".", "...", "U.S.", "\n", "", " ", "it's", "1.5"]
    return " ".join(generator.choice(vocabulary) for _ in range(count))


def test_rouge_l_is_that_of_the_package_rouge():
    from rouge import Rouge

    generator, package = random.Random(0), Rouge(metrics=["rouge-l"])
    scores = []
    for _ in range(400):
        texts = [words(generator, generator.randrange(30)) for _ in range(2)]
        try:
            expected = package.get_scores(*texts)[0]["rouge-l"]["f"]
        except ValueError:  # a text without a sentence
            expected = 0.0
        scores.append(rouge_l_f(*texts))
        assert scores[-1] == pytest.approx(expected, abs=1e-9), texts
    assert min(scores) == 0 and max(scores) > 0.9 and len(set(scores)) > 50


def test_a_text_that_overflows_longbenchs_stack_scores_zero_at_any_depth():
    fits = " ".join(map(str, range(OVERFLOW - 1)))
    assert rouge_l_f(fits, fits) == pytest.approx(1)
    assert rouge_l_f(fits + " more", fits + " more") == 0
    assert rouge_l_f("0 " + "x " * (OVERFLOW - 2), "0") > 0  # long by one text alone
    assert rouge_l_f("0 " + "x " * (OVERFLOW - 1), "0") == 0

    def deeper(levels):
        return rouge_l_f(fits, fits) if levels == 0 else deeper(levels - 1)

    assert deeper(500) == pytest.approx(1)


def test_chinese_rouge_overflows_one_step_earlier():
    chinese = "，".join("天地人山水火风雷日月"[i % 10] for i in range(495))  # 989 words
    assert METRICS["rouge_zh"](chinese, [chinese]) == pytest.approx(1)
    assert METRICS["rouge_zh"](chinese + "，", [chinese + "，"]) == 0


def test_jieba_says_nothing():
    code = "from hashattn.evaluation.metrics import qa_f1_zh as f; print(f('北京大学', ['北京']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0.0\n", "")


def adversarial(generator, metric):
    """(prediction, answers, all_classes) with what the metric reads, often nearly right."""
    parts = {
        "retrieval_score": ["Paragraph 3", "3", "13", "٣", "\n", "."],
        "retrieval_zh_score": ["段落3", "3", "１3", "\n", "。"],
        "count_score": ["3", "13", "there", "3.1", "\n", "-3"],
        "code_sim_score": ["return x", "# a", "//", "`", "\n", "for i in y:", "ab" * 120, " "],
        "classification_score": ["a", "ab", "b", "abc", " ", "\n", "c"],
    }.get(
        metric, [*"我们会议人工智能，。！ \n", "北京大学", "the", " cat", " Dog", ".", " 1,2", "ﬁ"]
    )
    text = "".join(generator.choice(parts) for _ in range(generator.randrange(40)))
    answer = {
        "retrieval_score": "Paragraph 3", "retrieval_zh_score": "段落3", "count_score": "3",
        "classification_score": generator.choice(["a", "ab", "abc"]),
    }.get(metric, text[generator.randrange(4) : 60 - generator.randrange(30)])  # fmt: skip
    return text, [answer], ["a", "ab", "b", "abc", "c"]


@pytest.mark.skipif(not OFFICIAL, reason="HASHATTN_LONGBENCH_DIR names no LongBench checkout")
@pytest.mark.filterwarnings("ignore")
def test_every_dataset_scores_as_longbenchs_own_code(monkeypatch):
    pytest.importorskip("fuzzywuzzy")
    from hashattn.evaluation.benchmarks.longbench import DATASETS

    monkeypatch.syspath_prepend(OFFICIAL)
    spec = importlib.util.spec_from_file_location("official", Path(OFFICIAL) / "eval.py")
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    sys.modules.pop("metrics", None)
    assert set(official.dataset2metric) == set(DATASETS)
    generator = random.Random(0)
    for name, function in official.dataset2metric.items():
        ours = METRICS[DATASETS[name].metric]
        for _ in range(1000):
            prediction, answers, classes = adversarial(generator, function.__name__)
            expected = max(function(prediction, a, all_classes=classes) for a in answers)
            assert ours(prediction, answers, classes) == pytest.approx(expected, abs=1e-9), name
