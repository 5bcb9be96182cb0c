"""Reports for Prometheus, as JSON lines and as a figure."""

import json
import math
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hashattn.base.files import WriteError, read_json_lines
from hashattn.trust.drift.export import append_report, draw_evidence, prometheus_text
from hashattn.trust.drift.report import Cause, DriftReport, LayerReport, StatisticReport


def report():
    alarm = Cause("key_surprise", 3, True, 120, 98)
    bits = {"keys": {"entropy": 30.5, "usual_entropy": 31.0, "moved": 0.02}}
    seen = StatisticReport(27.5, 1.5, 29.25, 400, 2.5)
    unseen = StatisticReport(0.4, 0.1, None, 0, 0.0)
    third = LayerReport(3, "alarm", 2.5, alarm, {"key_surprise": seen, "recall": unseen},
                        {"sparse": 390, "several_rows": 10}, 0.025, bits)  # fmt: skip
    fifth = LayerReport(5, "warn", 0.2, None, {"recall": unseen}, {"dense_layer": 400}, 1.0, {})
    overall = LayerReport(None, "alarm", 2.5, alarm, {"key_surprise": seen},
                          {"sparse": 390, "several_rows": 10}, 0.025, {})  # fmt: skip
    return DriftReport(400, overall, (third, fifth), 0.1, 10_000, 0.02)


def samples(text):
    """{(name, labels): value} by prometheus_client's own parser."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_text_holds_every_number():
    found = samples(prometheus_text(report(), {"model": 'a "b"\\\n'}))

    def value(name, **labels):
        return found["hashattn_drift_" + name, frozenset(({"model": 'a "b"\\\n'} | labels).items())]

    assert value("tokens") == 400
    assert [value("state", layer=layer) for layer in ("all", "3", "5")] == [2, 2, 1]
    assert value("evidence", layer="3", statistic="key_surprise") == 2.5
    assert value("recent", layer="3", statistic="key_surprise") == 29.25
    assert value("usual", layer="5", statistic="recall") == 0.4
    assert value("seen", layer="5", statistic="recall") == 0
    assert value("since", layer="3", statistic="key_surprise") == 98
    assert value("rows", layer="3", reason="several_rows") == 10
    assert value("code_entropy_bits", layer="3", codes="keys") == 30.5
    assert value("bit_rates_moved", layer="3", codes="keys") == 0.02
    assert not any(name.endswith("recent") and ("statistic", "recall") in labels
                   for name, labels in found)  # fmt: skip
    assert prometheus_text(report()) == prometheus_text(report())  # a registry of its own


def test_reports_are_added_line_by_line(tmp_path):
    path = tmp_path / "new" / "drift.jsonl"
    append_report(path, report(), host="a")
    append_report(path, replace(report(), steps=500))
    with open(path, "a") as file:
        file.write('{"half a li' + 100_000 * "n")  # a process was killed here
    append_report(path, replace(report(), steps=600))
    lines = [line for _, line in read_json_lines(path)]
    assert [line["steps"] for line in lines] == [400, 500, 600]
    first = lines[0]
    assert first["host"] == "a" and first["layers"][0]["cause"]["since"] == 98
    assert first == json.loads(json.dumps(report().to_dict() | {"host": "a"}))


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(WriteError, match="cannot be written"):
        append_report(tmp_path, report())


class Monitor:
    """Stands in for a monitor whose evidence rose."""

    def __init__(self, layers=2):
        self.layers = layers
        steps = np.arange(16, 416, 16)
        self.curve = (
            steps,
            {
                layer: np.exp((steps - 300) / 30.0 - number)
                for number, layer in enumerate([*range(layers), None])
            },
        )

    def report(self):
        cause = Cause("recall", 0, False, 320, 250)
        layers = [
            LayerReport(n, "ok", 0.1, cause if n == 0 else None, {}, {}, 0.0, {})
            for n in range(self.layers)
        ]
        overall = LayerReport(None, "alarm", 1.5, cause, {}, {}, 0.0, {})
        return DriftReport(400, overall, tuple(layers), 0.1, 10_000, 0.02)


@pytest.mark.parametrize(("layers", "named"), [(2, 2), (9, 0)])
def test_the_figure_shows_every_layer_and_both_limits(layers, named):
    with mpl.rc_context({"backend": "agg"}):
        monitor = Monitor(layers)
        axis = draw_evidence(monitor, shift=200)
        names = [text.get_text() for text in axis.get_legend().get_texts()]
        assert sum(name.startswith("layer") for name in names) == named
        assert {"mean over layers", "alarm", "warning", "traffic changed"} <= set(names)
        heights = [line.get_ydata()[0] for line in axis.lines if len(line.get_ydata()) == 2]
        assert {1.0, 0.1} <= set(heights) and axis.get_yscale() == "log"
        curves = [line for line in axis.lines if len(line.get_ydata()) == 25]
        assert len(curves) == layers + 1
        np.testing.assert_allclose(curves[-1].get_ydata(), monitor.curve[1][None].clip(1e-8, 1e3))
        dots = [line for line in axis.lines if len(line.get_ydata()) == 1]
        assert [float(np.ravel(dot.get_xdata())[0]) for dot in dots] == [320.0]
        assert draw_evidence(monitor, axis) is axis


def test_the_summary_names_the_cause():
    text = report().summary()
    assert "alarm after 400 tokens" in text and "key_surprise of layer 3 rose at token 98" in text
    assert math.isclose(report().warn_at, 0.1) and report().state == "alarm"
