"""The pilot's report: what to do, in HTML, Markdown and JSON, English or Japanese."""

from hashattn.base.lazy import lazy

_EXPORTS = {
    "load_result": "hashattn.pilot.report.result",
    "ReportError": "hashattn.pilot.report.result",
    "ReportFiles": "hashattn.pilot.report.files",
    "save_report": "hashattn.pilot.report.files",
}
__all__ = sorted(_EXPORTS)
__getattr__ = lazy(__name__, _EXPORTS)
