"""Numbers as people read them, each worked by hand."""

import pytest

from hashattn.pilot.report import numbers
from hashattn.pilot.report.visible import short, visible


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.27, "1.3"), (3.14, "3.1"), (0.0042, "0.0042"), (0.0999, "0.10"), (12345, "12,000"),
        (996, "1,000"), (9.96, "10"), (0, "0"), (1e-7, "<0.0001"), (-1e-7, ">−0.0001"),
        (-0.21, "−0.21"), (1.0, "1.0"), (128.0, "130"),
    ],
)  # fmt: skip
def test_two_significant_digits(value, shown):
    assert numbers.significant(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.93, "93%"), (1, "100%"), (0.999, ">99%"), (0.994, "99%"), (0.0039, "0.39%"), (0, "0%"),
     (0.01, "1%"), (1.5, "150%")],
)  # fmt: skip
def test_shares_are_neither_none_nor_all_unless_they_are(value, shown):
    assert numbers.percent(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1 / 16, "1/16"), (0.0625, "1/16"), (0.125, "1/8"), (0.3, "30%"), (1, "1/1"), (1 / 3, "1/3")],
)
def test_budgets(value, shown):
    assert numbers.fraction(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(-0.02, "−2"), (0.034, "+3"), (0.004, "0"), (-0.004, "0"), (0.0, "0")]
)
def test_whole_points(value, shown):
    assert numbers.points(value) == shown


@pytest.mark.parametrize(
    ("low", "shown"), [(-0.08, "8"), (-0.081, "9"), (-0.001, "1"), (0.02, "0"), (-0.29, "29")]
)
def test_what_may_be_lost_is_rounded_up(low, shown):
    assert numbers.loss(low) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(720, "720 B"), (999.6, "1.0 kB"), (23040, "23 kB"), (94371840, "94 MB"), (131e9, "131 GB"),
     (2.5e15, "2500 TB")],
)  # fmt: skip
def test_sizes(value, shown):
    assert numbers.size(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (431.2, "7 min 11 s"),
                           (7500, "2 h 5 min")],
)  # fmt: skip
def test_durations(seconds, shown):
    assert numbers.duration(seconds) == shown


def test_what_cannot_be_seen_is_shown_and_lines_become_spaces():
    text = visible("a\u202eb\0c\n\n\td \ud800 e\u2028f\ufeff")
    assert text == "a⟨U+202E⟩b⟨U+0000⟩c d ⟨U+D800⟩ e f⟨U+FEFF⟩"
    assert visible("日本語 مرحبا 👩‍👩‍👧") == "日本語 مرحبا 👩‍👩‍👧"


def test_long_texts_are_cut_and_say_so():
    assert short("abc", 3) == "abc"
    assert short("abcd", 3) == "ab…"
    assert short("a" + " " * 100, 3) == "a…"
    assert len(short("x" * 10**6)) == 280
