"""Japanese."""

TEXTS = {
    "page.eyebrow": "パイロット報告書：自社文書でのスパースアテンションの検証",
    "page.made": "{date} · モデル {model}（{note}）· 読んだ文書 {documents:count} 件、"
    "読まなかったファイル {skipped:count} 件",
    "page.contents": "この報告書の内容",
    "note.embedded": "パッケージ付属の教材用モデル",
    "note.pretrained": "学習済みモデル",
    "note.own": "自社のモデル",
    "budget.one_of": "{n} トークンにつき 1 トークン",
    "budget.share": "トークンの {share}",
    # page one
    "verdict.go": "導入を推奨",
    "verdict.go_with_fallback": "フォールバック付きで導入を推奨",
    "verdict.no_go": "見送り",
    "verdict.cannot_be_judged": "判定不能",
    "means.go": "この文書では、長い文章の一部だけを読んでも、すべてを読む場合と比べて許容範囲の結"
    "果が得られました。",
    "means.go_with_fallback": "長い文章の一部だけを読む方式は、危うい箇所で全文を読む方式に切り替"
    "えるなら、ここで使う価値があります。",
    "means.no_go": "現状では、長い文章の一部だけを読む方式をここで使う価値はありません。",
    "means.cannot_be_judged": "このパイロットでは判断できませんでした。可でも否でもありません。"
    "何が足りないかは、理由に示します。",
    "budget.name": "使う予算（読む量）",
    "budget.read": "{budget:budget}を読む",
    "budget.none": "推奨なし",
    "reasons.title": "理由",
    "tiles.title": "三つの数字",
    "next.title": "次にすること",
    "tile.quality": "フルアテンションと比べた品質",
    "tile.quality.value": "{difference:points} 点",
    "language.en": "英語",
    "language.ja": "日本語",
    "tile.quality.text": "{budget:budget}を読む場合：{measure:name measure}、100 点満点で "
    "{low:points} 点から {high:points} 点（{count:count} {measure:name unit}）。{found}。",
    "tile.fidelity.value": "{agreement:percent}",
    "tile.fidelity.text": "{budget:budget}を読む場合に、次のトークンがフルアテンションと一致した割"
    "合（テキスト{documents:count} 件）。KL {kl:ratio}、{low:ratio} から {high:ratio}。",
    "tile.quality.cannot": "モデルの答えを当て推量と区別できなかったため、"
    "スパースアテンションによる品質への影響はわかりません。",
    "tile.quality.none": "測定に足る長さの文章がありませんでした。",
    "tile.memory": "コードに使うメモリー",
    "tile.memory.text": "{context:count} トークンで {kv:size} の KV キャッシュへの上乗せです。"
    "キャッシュ自体は小さくならず、読む量が減ります。",
    "tile.cost": "装置時間（予測）",
    "tile.cost.value": "{dense:ratio} → {sparse:ratio}",
    "tile.cost.text": "{period}。左がフルアテンション、右がスパースアテンションです{money}。"
    "計算値であり、測定値ではありません。",
    "tile.cost.period": "1 日 {tokens:count} トークン、{days:count} 日分",
    "tile.cost.period_untold": "指定された処理量の場合",
    "tile.cost.money": "（費用 {dense:ratio} → {sparse:ratio} {currency}、1 時間 {price}）",
    "tile.cost.money_untold": "（費用 {dense:ratio} → {sparse:ratio} {currency}）",
    "tile.speed": "1 トークンの時間（この機械で測定）",
    "tile.speed.faster": "{speedup:ratio} 倍速い",
    "tile.speed.slower": "{slowdown:ratio} 倍遅い",
    "tile.speed.same": "差は認められない",
    "tile.speed.text": "{budget:budget}を読む場合：{context:count} トークンで {dense:ratio} ms "
    "に対し {ms:ratio} ms（{steps:count} ステップ）。",
    "tile.speed.none": "測定なし",
    "tile.speed.none.text": "この機械での時間も、料金と処理量も与えられていません。",
    "unknown": "不明",
    # findings
    "finding.kept": "維持",
    "finding.lost": "低下",
    "finding.open": "未確定",
    "finding.cannot_be_judged": "判定不能",
    "explain.kept": "維持：区間の全体が、許容範囲の内にあります。",
    "explain.lost": "低下：区間の全体が、許容範囲の外にあります。",
    "explain.open": "未確定：区間が両方にまたがります。質問や文書を増やせば狭まります。",
    "explain.allowed": "測定前に決めた許容範囲：100 点満点で {tolerance:score} 点、KL で "
    "{kl:ratio}。",
    "explain.cannot_be_judged": "判定不能：モデル自体を当て推量と区別できませんでした。",
    "found.none": "差は認められない",
    "found.lower": "フルアテンションより低い",
    "found.higher": "フルアテンションより高い",
    "measure.questions": "質問への回答",
    "measure.quotes": "文書中の文の補完",
    "measure.fidelity": "フルアテンションとの近さ",
    "unit.questions": "問",
    "unit.quotes": "文",
    "measure.text": "文章の予測",
    "unit.text": "件",
    "range.points": "{low:points} から {high:points}",
    "range.ratio": "{low:ratio} から {high:ratio}",
    # quality
    "quality.title": "品質と読む量",
    "quality.intro": "スパースアテンションは、1 語を書くたびに文章の一部だけを読みます。"
    "各行は一つの予算（読んでよい量）です。フルアテンション（デンスとも呼びます）はすべてを読みま"
    "す。",
    "quality.none": "文章が足りず、何も測定していません。",
    "quality.questions": "質問への回答",
    "quality.quotes": "文書中の文の補完",
    "quality.fidelity": "フルアテンションとの近さ（1 語ごと）",
    "column.budget": "予算",
    "column.read": "実際に読んだ量",
    "column.full": "フルアテンション",
    "column.sparse": "スパース",
    "column.difference": "差",
    "column.found": "言葉では",
    "column.count.questions": "質問数",
    "column.count.quotes": "文の数",
    "column.same": "まったく同じ答え",
    "column.finding": "所見",
    "column.kl": "KL 情報量",
    "column.agreement": "次のトークンの一致",
    "column.perplexity": "パープレキシティ（倍）",
    "column.free": "続きを書いたときの一致",
    "column.documents": "文書数",
    "more.untold": "必要な数はわからない",
    "more.questions": "計 {more:count} 問ほど必要",
    "more.quotes": "計 {more:count} 文ほど必要",
    "more.documents": "計 {more:count} 件ほど必要",
    "difference.note": "{range}、{found}",
    "free.of": "{new:count} 中 {same:ratio}",
    "quality.points_note": "得点は 100 点満点です。区間は{measure:name measure}についての 95% "
    "ブートストラップ区間です。",
    "quality.fidelity_note": "KL：次のトークンの確率がどれだけ動いたか（ナット）。0 は変化なし。"
    "区間はテキストについての 95% ブートストラップ区間です。",
    "cut.none": "モデルの文脈に収めるために切り詰め、または分けて読んだ文書：{of:count} 件中 0 "
    "件。",
    "cut.some": "モデルの文脈に収めるために切り詰め、または分けて読んだ文書：{of:count} 件中 "
    "{contexts:count} 件。それで失われた答え：{lost:count} 件。これはどの方式でも見つけられませ"
    "ん。",
    "cut.some_untold": "モデルの文脈に収めるために切り詰め、または分けて読んだ文書：{of:count} "
    "件中 {contexts:count} 件。それで失われた答えの数は不明です。",
    "cut.unknown": "文書を切り詰めたかどうかは記録されていません。",
    "cannot.curve": "{measure:name heading}：判定不能のため、曲線は描いていません。"
    "モデル自体を当て推量と区別できませんでした。",
    "heading.questions": "質問への回答",
    "heading.quotes": "文書中の文の補完",
    "heading.fidelity": "フルアテンションとの近さ",
    "figure.score.title": "{measure:name heading}（100 点満点）",
    "figure.score.caption": "横：文章のうち読む割合。縦：得点。縦線はフルアテンションとの差の区間"
    "です。{count:count} {measure:name unit}。",
    "figure.score.alt": "読む割合に対する得点。フルアテンション {dense:score}、当て推量 "
    "{guess:score}、スパース：{points}。",
    "figure.point.score": "{budget:fraction} で {sparse:score}",
    "figure.kl.title": "フルアテンションからの KL 情報量",
    "figure.kl.caption": "横：文章のうち読む割合。縦：KL（ナット）。小さいほど近い。"
    "縦線は区間です。テキスト{documents:count} 件。",
    "figure.kl.alt": "読む割合に対する KL 情報量：{points}。",
    "figure.point.kl": "{budget:fraction} で {kl:ratio}",
    "figure.latency.title": "1 トークンあたりのミリ秒",
    "figure.latency.caption": "{device}、{context:count} トークン、{steps:count} ステップで測定。"
    "1/1 はフルアテンションです。棒は中央値、線は下限から上限です。",
    "figure.latency.alt": "1 トークンあたりのミリ秒。フルアテンション {dense:ratio}、"
    "スパース：{points}。",
    "figure.point.latency": "{budget:fraction} で {ms:ratio}",
    "figure.memory.title": "1 トークンあたりに読むバイト数",
    "figure.memory.caption": "{context:count} トークンで 1 ステップが読むキーとバリュー、"
    "それにコード（すべて読む）。1/1 はフルアテンションです。予算から計算した値です。キャッシュの "
    "{kv:size} はすべてメモリーに残ります。",
    "figure.memory.alt": "1 トークンあたりに読むバイト数。フルアテンション {kv:size}、"
    "スパース：{points}。",
    "figure.point.memory": "{budget:fraction} で {bytes:size}",
    "key.sparse": "スパース（縦線は区間）",
    "key.full": "フルアテンション",
    "key.everything": "フルアテンション",
    "key.guess": "当て推量",
    "key.cache": "キーとバリュー",
    "key.codes": "コード",
    # floors
    "floors.title": "このモデルはそもそも答えられるか",
    "floors.intro": "スパースアテンションを評価する前に、モデル自体を評価します。"
    "すべてを読んだとき、当て推量より良いか。良くなければ、どのアテンション方式でも改善せず、"
    "その答えに基づく判定はしません。",
    "floors.caption": "モデル自体（すべてを読む場合）",
    "floors.column.what": "課題",
    "floors.column.model": "モデル",
    "floors.column.guess": "当て推量",
    "floors.column.difference": "差",
    "floors.column.count": "標本数",
    "floors.column.clear": "当て推量より良いか",
    "floors.questions": "質問への回答（100 点満点）",
    "floors.quotes": "文書中の文の補完（100 点満点）",
    "floors.text": "文章の予測（1 バイトあたりのビット数。当て推量はファイル圧縮。小さいほど良い）",
    "floors.clear": "はい",
    "floors.unclear": "当て推量と区別できない",
    "floors.absent": "測定なし",
    # documents
    "documents.title": "文書",
    "documents.intro": "採点に {scored:count} 件、コードの調整に {calibration:count} "
    "件（採点には使いません）、未使用 {unused:count} 件、読まなかったもの {skipped:count} 件。",
    "documents.none": "読めた文書はありません。",
    "documents.read": "読んだ文書",
    "documents.name": "文書",
    "documents.use": "用途",
    "documents.kind": "種類",
    "documents.characters": "文字数",
    "documents.tokens": "トークン数",
    "documents.cut": "切り詰め",
    "documents.yes": "あり",
    "documents.no": "なし",
    "use.scored": "採点",
    "use.calibration": "コードの調整",
    "use.unused": "なし",
    "documents.skipped": "読まなかったファイル",
    "documents.reason": "理由",
    "documents.first": "{all:count} 件中、最初の {shown:count} 件。すべては pilot.json "
    "にあります。",
    "shortened": "長い文は短くしています。全文は pilot.json にあります。",
    # changed
    "changed.title": "変わった答え",
    "changed.intro": "フルアテンションとスパースアテンションで答えが異なる質問です。"
    "監査ページでは、どこが読まれ、どこが読まれなかったかを確認できます。",
    "changed.none": "比べた答えに、変わったものはありません。",
    "changed.none_asked": "質問がなかったため、答えは比べていません。",
    "changed.caption": "質問ごとの比較",
    "changed.question": "質問",
    "changed.expected": "正答",
    "changed.full": "フルアテンション",
    "changed.sparse": "スパース",
    "changed.audit": "監査",
    "changed.open": "開く",
    "changed.right": "{text}（正）",
    "changed.wrong": "{text}（誤）",
    "changed.or": " / ",
    "changed.in": "{question}（文書：{document}）",
    "changed.empty": "（答えなし）",
    # speed and memory
    "speed.title": "時間とメモリー",
    "speed.none": "この機械での時間は測定していません。",
    "speed.caption": "1 トークンの時間（{device}、{context:count} トークン、{steps:count} "
    "ステップ）",
    "speed.ms": "ミリ秒（中央値）",
    "speed.speedup": "フルアテンションとの比",
    "speed.full": "フルアテンション",
    "speed.times": "{speedup:ratio} 倍",
    "speed.below": "デンスのままの範囲",
    "speed.below.tokens": "{tokens:count} トークン未満",
    "speed.below.any": "すべての長さ",
    "speed.note": "この機械、この長さでの測定です。他の機械や長さでは異なります。"
    "そこで何が可能かは、事前計算に示します。スパースなステップがこの機械で遅くならない長さ"
    "に満たない間は、デコードはデンスのままで、時間もデンスなステップのものです。",
    "speed.saved": "{context:count} トークンの読み込みに {once:ratio} 秒かかりました。"
    "コンテキストを保存すれば、{questions} 個の質問でもこれは 1 回で済みます（毎回読むと "
    "{each:ratio} 秒）。",
    "memory.caption": "{context:count} トークンでのメモリー",
    "memory.what": "項目",
    "memory.token": "1 トークン",
    "memory.all": "合計",
    "memory.share": "キャッシュに対する割合",
    "memory.kv": "キーとバリュー（KV キャッシュ）",
    "memory.codes": "コード（上乗せ）",
    "memory.note": "この測定では、キーとバリューはすべてメモリーに残し、読む量だけを減らしました。"
    "ホットセットやビット数の削減で必要になるメモリーは、事前計算に示します。",
    # codes
    "codes.title": "コード",
    "codes.none": "コードは作られていません。",
    "codes.intro": "コードは各トークンの短い指紋で、読む価値のあるものを探すのに使います。",
    "codes.method": "方式",
    "codes.method.hash": "学習ハッシュ",
    "codes.method.transform": "較正変換",
    "codes.bits": "コードのビット数",
    "codes.origin": "由来",
    "codes.origin.shipped": "モデルに付属",
    "codes.origin.calibrated": "自社文書（採点しない分）で較正",
    "codes.origin.trained": "自社文書（採点しない分）で学習",
    "codes.tokens": "調整に使った自社文書のトークン数",
    "codes.bytes": "1 トークンあたりのバイト数",
    "codes.mass": "コードで見つかるアテンションの割合",
    "codes.mass_of_exact": "厳密な探索で見つかるアテンションの割合",
    "codes.mass_before": "調整前に見つかったアテンションの割合",
    # pre-flight
    "preflight.title": "事前計算：最大でどれだけ得られるか",
    "preflight.none": "事前計算はありません。",
    "preflight.worth": "パイロットの価値があります。",
    "preflight.marginal": "効果はわずかです。",
    "preflight.no": "パイロットの価値はありません。",
    "preflight.changes": "結論を変えるもの",
    "preflight.caption": "計算の内訳",
    "preflight.line": "量",
    "preflight.value": "値",
    "quantity.bytes": "{value:size}",
    "quantity.bytes a second": "毎秒 {value:size}",
    "quantity.share": "{value:percent}",
    "quantity.times": "{value:ratio} 倍",
    "quantity.tokens": "{value:count} トークン",
    "quantity.devices": "{value:count} 台",
    "quantity.sequences": "{value:count} 系列",
    "quantity.ms": "{value:ratio} ms",
    "quantity.us": "{value:ratio} µs",
    "holdings.caption": "装置に置くキャッシュ（コードを含む）",
    "holdings.what": "装置に残すもの",
    "holdings.bytes": "メモリー",
    "holdings.longest": "1 台に収まる最長の文脈（トークン）",
    "cost.caption": "予測される費用",
    "cost.what": "項目",
    "cost.full": "フルアテンション",
    "cost.sparse": "スパース",
    "cost.hours": "装置時間",
    "cost.money": "費用（{currency}）",
    "cost.given": "前提：1 日 {tokens:count} トークン、{days:count} 日、装置 1 時間 {price} "
    "{currency}。計算による予測であり、測定値ではありません。回答を書く時間だけで、"
    "プロンプトの読み込みと待機時間は含みません。",
    "cost.given_untold": "与えられた料金と処理量からの計算による予測であり、測定値ではありません。"
    "回答を書く時間だけで、プロンプトの読み込みと待機時間は含みません。",
    "cost.none": "料金と処理量が与えられていないため、費用は計算していません。",
    # monitor, privacy
    "monitor.title": "監視すること、コードを作り直すとき",
    "monitor.none": "運用しないため、監視するものはありません。",
    "private.title": "プライバシー",
    "private.here": "パイロットはこの機械の中だけで動きます。文書、質問、"
    "答えはこの機械のディスクから読まれ、このページに含まれます。このページは外部から何も読み込み"
    "ません。ページを持つ人は、載っている文章を読めます。",
    "private.sockets": "実行中、プロセスのネットワーク接続は禁止されていました。",
    "private.sockets_not": "今回の実行では、プロセスのネットワーク接続は禁止されていませんでした。",
    "private.offline": "ライブラリーはオフラインモードで動きました。",
    "private.offline_not": "ライブラリーはオフラインモードではありませんでした。"
    "モデルを取得した可能性があります。このパッケージは文書を送信しません。",
    # reproduce
    "reproduce.title": "再実行の方法",
    "reproduce.intro": "同じファイル、版、モデルでこのコマンドを実行すると、"
    "パイロットを再現できます。丸めていない数値は pilot.json にあります。",
    "reproduce.again": "同じ数値から英語の報告書を作るには：",
    "reproduce.use": "推奨した設定を自分のコードで使う方法（モデル付属でないコードは、"
    "このレポートのフォルダーにあります）：",
    "reproduce.settings": "設定",
    "reproduce.facts": "版と機械",
    "reproduce.name": "名前",
    "reproduce.value": "値",
    "fact.date": "日付",
    "fact.version": "パッケージの版",
    "fact.code": "ソースコード（SHA-256）",
    "fact.model": "モデル",
    "fact.model_sha256": "モデル（SHA-256）",
    "fact.seconds": "所要時間",
    "fact.cores": "コア数",
    "fact.gpu": "GPU",
    "fact.memory_gib": "メモリー（GiB）",
    "fact.processor": "プロセッサー",
    "fact.system": "システム",
    "fact.threads": "スレッド数",
    "value.none": "なし",
    # next steps, by the key of a reason
    "next.verdict.go": "実際の処理のごく一部をこの予算で動かし、フルアテンションと並べて比べてくだ"
    "さい。",
    "next.verdict.go_with_fallback": "実際の処理のごく一部を、この予算とフォールバック付きで動か"
    "し、フォールバックの頻度を見てください。",
    "next.verdict.no_go": "フルアテンションのまま使ってください。上の理由のどれかがなくなったら、"
    "パイロットをやり直してください。",
    "next.quality_lost": "予算を大きくするか、自社の文章をもっと使ってコードを学習してください。",
    "next.fidelity_lost": "予算を大きくするか、自社の文章をもっと使ってコードを学習してください。",
    "next.quality_open.quotes": "文書を増やしてください。計 {more:count} 文ほどで確定できます。",
    "next.quality_open.quotes_untold": "文書を増やしてください。",
    "next.quality_open": "質問を増やしてください。計 {more:count} 問ほどで確定できます。",
    "next.quality_open_untold": "答え付きの質問を増やしてください。",
    "next.fidelity_open": "文書を増やしてください。計 {more:count} 件ほどで確定できます。",
    "next.fidelity_open_untold": "文書を増やしてください。",
    "next.dense_cannot_answer": "すべてを読めばこれらの課題に答えられるモデルを選び、"
    "パイロットをやり直してください。",
    "next.text_not_predicted": "文書がモデルの扱える言語の文章かを確かめるか、"
    "別のモデルを選んでください。",
    "next.nothing_to_judge": "文書を増やすか、もっと長い文書を使ってください。",
    "next.contexts_cut": "もっと長い文脈を扱えるモデルか、短い文書を使ってください。",
    "next.model_is_embedded": "実際に運用するモデルでパイロットをやり直してください（MODEL=...）。",
    "next.preflight_no": "より長い文脈、大きいバッチ、別の装置を検討してください（事前計算を参照）"
    "。",
    "next.slower_here": "実際に運用する装置で測ってください。",
    "next.not_judged": "すべてを読めばこれらの課題をこなせるモデルを選び、"
    "パイロットをやり直してください。",
}

SENTENCES = {
    "quality_kept": "{budget:budget}を読む場合、{measure:name measure}の品質は維持されます。"
    "フルアテンションとの差は 100 点満点で {difference:points} 点で、{low:loss} "
    "点を超える低下は考えにくい（{count:count} {measure:name unit}）。",
    "quality_open": "{budget:budget}を読む場合、{measure:name measure}の品質が保たれるかは未確定で"
    "す。フルアテンションとの差は 100 点満点で {difference:points} 点ですが、最大 {low:loss} "
    "点低い可能性があります（{count:count} {measure:name unit}。約 {more:count} "
    "{measure:name unit}で確定できます）。",
    "quality_open_untold": "{budget:budget}を読む場合、{measure:name measure}の品質が保たれるかは"
    "未確定です。フルアテンションとの差は 100 点満点で {difference:points} 点ですが、最大 "
    "{low:loss} 点低い可能性があります（{count:count} {measure:name unit}）。",
    "quality_lost": "{budget:budget}を読む場合、{measure:name measure}の品質は低下します。"
    "フルアテンションとの差は 100 点満点で {difference:points} 点で、最大 {low:loss} "
    "点低い可能性があります（{count:count} {measure:name unit}）。",
    "fidelity_kept": "{budget:budget}を読む場合、モデルはフルアテンションとほぼ同じように書きま"
    "す。次のトークンの {agreement:percent} が一致します（KL {kl:ratio}、テキスト{documents:count} "
    "件）。",
    "fidelity_open": "{budget:budget}を読む場合、モデルがフルアテンションと同じように書くかは未確"
    "定です。KL {kl:ratio}、最大 {kl_high:ratio} の可能性があります（テキスト{documents:count} 件。"
    "約 {more:count} 件で確定できます）。",
    "fidelity_open_untold": "{budget:budget}を読む場合、モデルがフルアテンションと同じように書くか"
    "は未確定です。KL {kl:ratio}、最大 {kl_high:ratio} の可能性があります（"
    "テキスト{documents:count} 件）。",
    "fidelity_lost": "{budget:budget}を読む場合、モデルはフルアテンションと同じようには書きませ"
    "ん。次のトークンの一致は {agreement:percent} です（KL {kl:ratio}、テキスト{documents:count} "
    "件）。",
    "dense_cannot_answer": "すべてを読んでも、{measure:name measure}でモデル自体を当て推量と区別で"
    "きません。100 点満点で {dense:score} 点、当て推量は {guess:score} 点です（{count:count} "
    "{measure:name unit}）。どのアテンション方式でも改善しません。原因はモデルか文書です。",
    "text_not_predicted": "モデルによるこの文章の予測は、ファイル圧縮より良くありません（1 "
    "バイトあたり {dense:ratio} ビット、圧縮は {guess:ratio} ビット、文書 {count:count} 件）。"
    "この種の文章を知らないモデルです。",
    "nothing_to_judge": "{measure:name measure}を判定するには足りません。{count:count} "
    "{measure:name unit}ですが、{least:count} 以上が必要です。",
    "not_judged": "読む量を減らすことによる{measure:name measure}への影響は判定不能です。"
    "そこではモデル自体を当て推量と区別できませんでした。",
    "preflight_no": "得られる効果が小さすぎます。事前計算では、この処理の速さは現在の "
    "{speedup:ratio} 倍です。アテンションの時間がゼロになっても {ceiling:ratio} 倍です（1 "
    "ステップで読む量のうち、キーとバリューは {share:percent}）。",
    "preflight_marginal": "効果は小さいか不確かです。事前計算では、この処理の速さは最大で現在の "
    "{speedup:ratio} 倍です（アテンションの時間がゼロなら {ceiling:ratio} 倍。1 "
    "ステップで読む量のうち、キーとバリューは {share:percent}）。",
    "preflight_worth": "効果の余地があります。事前計算では、この処理の速さは現在の "
    "{speedup:ratio} 倍です（アテンションの時間がゼロなら {ceiling:ratio} 倍。1 "
    "ステップで読む量のうち、キーとバリューは {share:percent}）。",
    "language_left_out": "{count:count} 件の質問（{language:name language}）は判定から外しました。"
    "すべてを読んでも、モデルの答えは当て推量と区別できません（100 点中 {dense:score} 点、"
    "当て推量 {guess:score} 点）。",
    "questions_withheld": "対象の文書がコードの調整用のため、{count:count} 件の質問は"
    "行いませんでした。",
    "questions_beyond": "時間の都合で {count:count} 件の質問は行いませんでした。すべて行うには、"
    'パイロットの samples の "questions" を増やしてください。',
    "contexts_cut": "文書 {of:count} 件中 {contexts:count} 件はモデルの文脈に収まらず、"
    "切り詰めるか分けて読みました。それで {answers_lost:count} 件の答えが失われ、"
    "これはどの方式でも見つけられません。",
    "model_is_embedded": "パッケージ付属の小さな教材用モデル（460 万パラメーター）での結果です。"
    "その答えは、実際に運用するモデルについて何も示しません。",
    "slower_here": "この機械では、{context:count} トークンで、スパースアテンションは速くなりません"
    "でした（フルアテンションの {speedup:ratio} 倍の速さ）。",
    "faster_here": "この機械では、{context:count} トークンで、スパースアテンションはフルアテンショ"
    "ンの {speedup:ratio} 倍の速さでした。",
    "dense_here": "この機械では、{dense_below:count} トークン未満ではスパースアテンションの効果が"
    "ありません。{context:count} トークンではデコードはデンスのままで、時間は今と変わりません。",
    "never_faster_here": "この機械では、モデルが読めるどの長さでもスパースアテンションの効果があ"
    "りません。デコードはデンスのままで、時間は今と変わりません。",
    # what to watch
    "watch_drift": "実際の処理でドリフト監視を動かしてください。警報は、"
    "処理する文章がこの測定に使った文章と似なくなったことを示します。",
    "watch_receipt": "受領記録を保存してください。実際に読んだ量が記録されます。"
    "{budget:budget}の近くにとどまるはずです。",
    "watch_fallback": "フォールバックで全文を読んだ回数を数えてください。割合が増えるのは、"
    "コードが処理する文章に合わなくなっているしるしです。",
    "retrain_when": "コードで見つかるアテンションが {mass:percent} を下回ったとき、"
    "またはドリフトの警報が出たときは、コードを作り直してください。",
    "recheck_when": "モデル、コード、文書の種類のどれかを変えたら、このパイロットをやり直してくだ"
    "さい。",
}
