"""The pre-flight's sentences, labels and numbers in English and Japanese.

The pilot's report merges SENTENCES with its own.
"""

from __future__ import annotations

from hashattn.base.checks import require_one_of
from hashattn.pilot.capacity import english, japanese
from hashattn.pilot.capacity.result import Figure, Note, Preflight
from hashattn.pilot.settings import LANGUAGES

VERDICT_WORDS = {"en": english.VERDICTS, "ja": japanese.VERDICTS}
SENTENCES = {"en": english.SENTENCES, "ja": japanese.SENTENCES}
LABELS = {"en": english.LABELS, "ja": japanese.LABELS}

# figures of a summary: the rest is in the JSON
_SHORT = (
    "kv_bytes_per_token", "weights", "kv", "codes", "kv_share", "ceiling", "tokens_read",
    "bytes_speedup", "measured_speedup", "dense_ms", "sparse_ms", "spare_us", "fixed_us",
    "break_even", "devices", "longest_context", "largest_batch",
)  # fmt: skip
_UNITS = {  # of a value as `shown` writes it
    "en": {"tokens": " tokens", "devices": "", "sequences": " sequences", "times": "x"},
    "ja": {"tokens": " トークン", "devices": " 台", "sequences": " 系列", "times": " 倍"},
}
_UNIT = {"MB": 1e6, "GB": 1e9}
_NONE = {"en": "none found", "ja": "該当なし"}
_HEADINGS = {
    "en": ("Why", "What would change it", "Figures", "Cost"),
    "ja": ("理由", "判定が変わる条件", "数値", "費用"),
}
_MEMORY = {
    "en": ("Cache on the device, codes included",
           "{what}: {size}; contexts of up to {tokens:,} tokens fit on one device"),
    "ja": ("デバイス上のキャッシュ（コードを含む）",
           "{what}：{size}。1 台に収まるコンテキストは最大 {tokens:,} トークン"),
}  # fmt: skip
_SETTING = {
    "en": "{model}, {context:,} tokens, batch {batch:,}, on {device}",
    "ja": "{model}、{context:,} トークン、バッチ {batch:,}、{device}",
}
_COST = {
    "en": (
        "{tokens:,.0f} answer tokens a day for {days} days: {dense:,.1f} device hours dense, "
        "{sparse:,.1f} sparse",
        "; {money_dense:,.2f} and {money_sparse:,.2f} {currency}",
        " (decoding alone, without prompts and idle time).",
    ),
    "ja": (
        "1 日 {tokens:,.0f} トークンの回答を {days} 日間：デンス {dense:,.1f} デバイス時間、"
        "スパース {sparse:,.1f} デバイス時間",
        "、{money_dense:,.2f} {currency} と {money_sparse:,.2f} {currency}",
        "（デコードのみ。プロンプト処理と待機時間は含みません）。",
    ),
}


def sentence(note: Note, language: str = "en") -> str:
    """A reason or a change in words; ValueError for an unknown language."""
    require_one_of("language", language, LANGUAGES)
    return SENTENCES[language][note.key].format(**note.values)


def shown(figure: Figure, language: str = "en") -> str:
    """A figure's value with its unit; bytes in B below a million, else in MB, GB
    or TB of 1000."""
    value, unit = figure.value, figure.unit
    if value is None:
        return _NONE[language]
    if unit.startswith("bytes"):
        return _bytes(value) + ("/s" if unit == "bytes a second" else "")
    if unit == "share":
        return f"{value:.1%}"
    if unit == "times":
        return f"{value:.2f}{_UNITS[language][unit]}"
    if unit in ("ms", "us"):
        return f"{value:,.3g} {unit}" if abs(value) < 1000 else f"{value:,.0f} {unit}"
    return f"{value:,}{_UNITS[language][unit]}"


def summary(result: Preflight, language: str = "en") -> str:
    """The pre-flight as text: the verdict first, then why, what would change it, cost, memory and
    figures."""
    require_one_of("language", language, LANGUAGES)
    why, changes, figures, cost = _HEADINGS[language]
    work = result.workload
    setting = _SETTING[language].format(
        model=result.model, context=work.context, batch=work.batch, device=result.device
    )
    parts = [f"{VERDICT_WORDS[language][result.verdict]}\n{setting}"]
    for heading, notes in ((why, result.reasons), (changes, result.changes)):
        parts.append("\n".join([heading, *(f"- {sentence(note, language)}" for note in notes)]))
    if result.cost is not None:
        parts.append(f"{cost}\n- {_cost(result, language)}")
    memory, held = _MEMORY[language]
    kept = [held.format(what=sentence(each.note, language), size=_bytes(each.bytes),
                        tokens=each.longest_context) for each in result.memory]  # fmt: skip
    parts.append("\n- ".join([memory, *kept]))
    lines = [f"- {LABELS[language][f.key]}: {shown(f, language)}" for f in result.lines
             if f.key in _SHORT]  # fmt: skip
    return "\n\n".join([*parts, "\n".join([figures, *lines])])


def _cost(result: Preflight, language: str) -> str:
    cost = result.cost
    start, money, end = _COST[language]
    text = start + (money if cost.money_dense is not None else "") + end
    return text.format(
        tokens=cost.tokens_per_day, days=cost.days, dense=cost.gpu_hours_dense,
        sparse=cost.gpu_hours_sparse, money_dense=cost.money_dense,
        money_sparse=cost.money_sparse, currency=cost.currency,
    )  # fmt: skip


def _bytes(value: float) -> str:
    if value < 1e6:
        return f"{value:,.0f} B"
    for unit in ("MB", "GB"):  # in steps at which three digits would round up to 1000
        if value < 999.5 * _UNIT[unit]:
            return f"{value / _UNIT[unit]:.3g} {unit}"
    return f"{value / 1e12:,.3g} TB" if value < 999.5e12 else f"{value / 1e12:,.0f} TB"
