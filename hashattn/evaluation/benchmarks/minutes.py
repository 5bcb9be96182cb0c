"""Minutes of meetings, generated: what a company's documents look like, in English and Japanese."""

from __future__ import annotations

import random
from collections.abc import Iterator

_PEOPLE = {
    "en": "Adler Brandt Chen Diaz Evans Fischer Garcia Haddad Ito Jensen Kumar Lopez Meyer Novak "
    "Okafor Patel Quinn Rossi Silva Tanaka Ueda Vogel Weber Young".split(),
    "ja": "青木 石田 上田 遠藤 岡本 加藤 木村 小林 斎藤 佐々木 清水 高橋 田中 中村 西村 橋本 "
    "藤田 松本 三浦 村上 森 山口 吉田 渡辺".split(),
}
_TOPICS = {
    "en": (
        "the migration of the billing system", "the contract with the logistics partner",
        "the audit of access rights", "the delay of the spring release", "training for new staff",
        "the budget of the northern office", "complaints about delivery times",
        "the renewal of the data centre lease", "the pilot with the insurance customer",
        "the quality of incoming parts", "energy costs of the second plant",
        "the hiring plan for the next quarter", "the response to the outage",
    ),
    "ja": (
        "請求システムの移行", "物流会社との契約", "アクセス権限の監査", "春のリリースの遅延",
        "新入社員の研修", "北支店の予算", "納期に関する苦情", "データセンター賃貸契約の更新",
        "保険会社との試験導入", "受入部品の品質", "第二工場の電力費", "次四半期の採用計画",
        "障害への対応",
    ),
}  # fmt: skip
_SENTENCES = {
    "en": (
        "{a} reported on {topic}: {n} of {m} items are closed.",
        "{a} asked {b} to send the figures for {topic} by day {d} of the month.",
        "{b} objected that {topic} would cost {n} thousand more than planned.",
        "It was decided that {a} takes over {topic} from {b}.",
        "The group could not agree on {topic}; the point returns in meeting {m}.",
        "{a} and {b} will review {topic} with the supplier on day {d}.",
        "On {topic}, {a} noted a risk: without an answer by day {d} the date moves by {n} days.",
        "{b} confirmed that the measures for {topic} from meeting {m} are complete.",
        "Reference {m}-{n} for {topic} is kept by {a}.",
        "{a} thanked {b} for the work on {topic} and closed the point.",
    ),
    "ja": (
        "{a}氏が{topic}について報告した。{m}件中{n}件が完了している。",
        "{a}氏は{b}氏に対し、{topic}の数値を{d}日までに提出するよう求めた。",
        "{b}氏は、{topic}の費用が計画より{n}万円増えると指摘した。",
        "{topic}の担当を{b}氏から{a}氏に変更することを決定した。",
        "{topic}については合意に至らず、第{m}回会議で再度審議する。",
        "{a}氏と{b}氏は{d}日に仕入先と{topic}を確認する。",
        "{topic}に関し、{a}氏は{d}日までに回答がない場合{n}日の遅れが生じると述べた。",
        "{b}氏は、第{m}回会議で定めた{topic}の対策が完了したことを確認した。",
        "{topic}の整理番号は{m}-{n}とし、{a}氏が保管する。",
        "{a}氏は{topic}に関する{b}氏の作業に謝意を示し、本件を終了した。",
    ),
}
_HEADS = {
    "en": "Minutes of meeting {m}. Present: {people}. Chair: {a}.",
    "ja": "第{m}回会議 議事録。出席者：{people}。議長：{a}。",
}


def meetings(language: str, seed: int) -> Iterator[str]:
    """Minutes of one meeting after the other, without end: a head, then 12 to 30 points."""
    rng = random.Random(f"{language} {seed}")
    number = rng.randrange(10, 90)
    while True:
        present = rng.sample(_PEOPLE[language], rng.randrange(4, 8))
        points = [_point(rng, language, present) for _ in range(rng.randrange(12, 31))]
        comma = ", " if language == "en" else "、"
        head = _HEADS[language].format(m=number, people=comma.join(present), a=present[0])
        yield "\n".join([head, *(f"{i}. {text}" for i, text in enumerate(points, 1))])
        number += 1


def _point(rng: random.Random, language: str, present: list[str]) -> str:
    a, b = rng.sample(present, 2)
    total = rng.randrange(12, 99)
    return rng.choice(_SENTENCES[language]).format(
        a=a, b=b, topic=rng.choice(_TOPICS[language]), d=rng.randrange(1, 29), m=total,
        n=rng.randrange(1, total),
    )  # fmt: skip
