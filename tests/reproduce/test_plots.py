import matplotlib
import numpy as np
import pandas as pd
import pytest

from hashattn.reproduce.plots import (
    METHOD_STYLES,
    markers,
    method_style,
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
    assert set(METHOD_STYLES) == {*METHODS, *HASH_VARIANTS}
    assert len({style.color for style in METHOD_STYLES.values()}) == len(METHOD_STYLES)
    assert len({style.marker for style in METHOD_STYLES.values()}) == len(METHOD_STYLES)


def test_variants_share_a_style_and_unknown_methods_are_refused():
    assert method_style("lsh 256 bits") == METHOD_STYLES["lsh"]
    with pytest.raises(ValueError, match="'magic' has no style"):
        palette(["hash", "magic"])


def test_tables_are_plain_csv(results):
    table = pd.DataFrame({"method": ["hash"], "score": [np.float64(1) / 3]})
    path = save_table(table, "scores")
    assert path == results / "tables" / "scores.csv"
    assert path.read_bytes() == b"method,score\nhash,0.333333\n"
    assert save_table(table.set_index("method"), "scores").read_bytes() == path.read_bytes()
