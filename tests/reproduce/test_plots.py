import matplotlib
import numpy as np
import pandas as pd
import pytest

from hashattn.reproduce.plots import (
    markers,
    method_style,
    method_styles,
    palette,
    save_figure,
    save_table,
    use_style,
)
from hashattn.reproduce.profiles import HASH_VARIANTS, METHODS

matplotlib.use("agg")


def draw():
    import matplotlib.pyplot as plt
    import seaborn

    use_style()
    rows = [(m, d, i / 10 + d) for i, m in enumerate(METHODS) for d in (0.1, 0.2)]
    table = pd.DataFrame(rows, columns=["method", "density", "score"])
    figure, axes = plt.subplots()
    seaborn.lineplot(table, x="density", y="score", hue="method", style="method", errorbar=None,
                     palette=palette(METHODS), markers=markers(METHODS), ax=axes)  # fmt: skip
    return figure


def test_the_same_figure_is_the_same_bytes(tmp_path):
    import matplotlib.pyplot as plt

    saved = [save_figure(draw(), "quality", tmp_path / name) for name in ("one", "two")]
    plt.close("all")
    assert [path.suffix for path in saved[0]] == [".png", ".svg"]
    for first, second in zip(*saved, strict=True):
        assert first.read_bytes() == second.read_bytes()
    assert b"Software" not in saved[0][0].read_bytes()
    assert b"dc:date" not in saved[0][1].read_bytes()


def test_every_method_has_its_own_colour_and_marker():
    styles = method_styles()
    assert set(styles) == {*METHODS, *HASH_VARIANTS}
    assert len({style.color for style in styles.values()}) == len(styles)
    assert len({style.marker for style in styles.values()}) == len(styles)


def test_colours_stay_what_readers_know():
    """Of figures already published; a method's class holds its own."""
    assert {name: (style.color, style.marker) for name, style in method_styles().items()} == {
        "dense": ("#000000", "s"),
        "oracle": ("#7f7f7f", "*"),
        "hash": ("#0072b2", "o"),
        "hash_64": ("#00579c", (8, 0, 0)),
        "hash_128": ("#003f7f", (7, 0, 0)),
        "hash_signs": ("#3a86ff", (6, 0, 0)),
        "hash_official": ("#7fb8d9", (5, 1, 180)),
        "transform": ("#0a9396", (4, 0, 0)),
        "rabitq": ("#b5179e", (5, 0, 0)),
        "double_sparsity": ("#d55e00", "^"),
        "quest": ("#009e73", "v"),
        "lsh": ("#cc79a7", "D"),
        "window": ("#e69f00", "P"),
        "random": ("#56b4e9", "X"),
        "streaming_llm": ("#ddcc77", "h"),
        "h2o": ("#882255", "<"),
        "snapkv": ("#999933", ">"),
        "infllm": ("#332288", "p"),
        "oracle_top_p": ("#bbbbbb", (4, 1, 0)),
        "sparq": ("#44aa99", (3, 1, 0)),
        "loki": ("#117733", (6, 1, 0)),
        "pqcache": ("#aa4499", (8, 1, 0)),
        "socket": ("#88ccee", (3, 1, 180)),
        "hata": ("#ee8866", (5, 0, 180)),
        "magicpig": ("#661100", "d"),
        "rerank": ("#004488", "H"),
        "residual": ("#6699cc", "8"),
        "certified": ("#004d40", (4, 1, 45)),
    }


def test_methods_without_a_style_of_their_own_get_free_ones(monkeypatch):
    """And a second name of a class, as all that draw it have to tell them apart."""
    before = method_styles()
    for name in ("quest_again", "quest_too"):
        monkeypatch.setitem(METHODS, name, METHODS["quest"])
    styles = method_styles()
    assert styles == method_styles() and before.items() <= styles.items()
    assert styles["quest_again"].label == "quest again"
    assert len({style.color for style in styles.values()}) == len(before) + 2
    assert len({style.marker for style in styles.values()}) == len(before) + 2
    assert method_style("quest_too 8 bits") == styles["quest_too"]


def test_variants_share_a_style_and_unknown_methods_are_refused():
    assert method_style("lsh 256 bits") == method_styles()["lsh"]
    with pytest.raises(ValueError, match="method = 'magic': must be one of"):
        palette(["hash", "magic"])


def test_tables_are_plain_csv(results, monkeypatch):
    monkeypatch.setenv("HASHATTN_PROFILE", "tiny")
    table = pd.DataFrame({"method": ["hash"], "score": [np.float64(1) / 3]})
    path = save_table(table, "scores")
    assert path == results / "tiny" / "tables" / "scores.csv"
    assert path.read_bytes() == b"method,score\nhash,0.333333\n"
    assert save_table(table.set_index("method"), "scores").read_bytes() == path.read_bytes()
