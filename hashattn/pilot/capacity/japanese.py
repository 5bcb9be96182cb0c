"""The pre-flight's words in Japanese; templates take a note's values through str.format."""

VERDICTS = {
    "worth": "パイロットを行う価値があります",
    "marginal": "効果は限定的です",
    "no": "見送り：この条件ではスパースアテンションの効果は見込めません",
}


SENTENCES = {
    "beyond_positions": "コンテキスト長 {context:,} トークンはモデルの上限 {positions:,} トークン"
    "を超えるため、アテンションの方式にかかわらずこのモデルでは扱えません。",
    "attention_is_small": "{context:,} トークン、バッチ {batch:,} では、デコード 1 ステップで読む"
    "バイト数のうちキーとバリューは {share:.1%} だけです。アテンションの時間がゼロになっても、速"
    "度は最大 {ceiling:.2f} 倍です。",
    "little_gained": "{context:,} トークン、バッチ {batch:,} では、デコード 1 ステップで読むバイ"
    "ト数の {share:.0%} がキーとバリューです（上限 {ceiling:.2f} 倍）。ただし予算 {budget:.2%} で"
    "の予測は {speedup:.2f} 倍にとどまります。",
    "slower": "{context:,} トークン、バッチ {batch:,} では、デコード 1 ステップで読むバイト数の "
    "{share:.0%} がキーとバリューです（上限 {ceiling:.2f} 倍）。しかし予算 {budget:.2%} では、"
    "スパースなステップはデンスより遅くなる予測です（{sparse:.2f} 倍）。",
    "dense_below": "{tokens:,} トークン未満ではデコードはデンスのままで（attach の dense_below）、"
    "時間は今と変わりません。",
    "never_sparse": "どの長さでもデコードはデンスのままで（attach の dense_below）、時間は今と変わ"
    "りません。",
    "some_gained": "{context:,} トークン、バッチ {batch:,} では、デコード 1 ステップで読むバイト"
    "数の {share:.0%} がキーとバリューです（上限 {ceiling:.2f} 倍）。予算 {budget:.2%} での予測は"
    " {speedup:.2f} 倍です。",
    "much_gained": "{context:,} トークン、バッチ {batch:,} では、デコード 1 ステップで読むバイト"
    "数の {share:.0%} がキーとバリューです（上限 {ceiling:.2f} 倍）。予算 {budget:.2%} での予測は"
    "、ステップ全体で {speedup:.2f} 倍です。",
    "measured_here": "このマシンで最大 {tokens:,} トークンのキャッシュを使い hashattn のカーネル"
    "を実測した予測です。1 ステップあたりデンス {dense_ms:.3g} ms（torch より速いことの多い独自カ"
    "ーネル）、スパース {sparse_ms:.3g} ms。Python やモデルの他の部分の時間は含みません。",
    "bandwidth_alone": "{device} のメモリ帯域とバイト数だけから計算しています。このデバイスでは実"
    "測していないため、ステップごとの固定コスト（カーネル起動、ホスト側の時間）は含みません。デン"
    "スとスパースの差は 1 層 1 ステップあたり {spare_us:,.0f} マイクロ秒です。",
    "fits": "重み、キー、バリュー、コードの合計は {needed_gb:.3g} GB で、{device} 1 台（"
    "{memory_gb:.3g} GB、うち {usable:.0%} を使用）に収まります。",
    "does_not_fit": "重み、キー、バリュー、コードの合計は {needed_gb:.3g} GB で、{device} 1 台（"
    "{memory_gb:.3g} GB、うち {usable:.0%} を使用）には収まりません。デンスでもスパースでも "
    "{devices:,} 台必要です。",
    "memory_not_saved": "読み出す量を減らすだけではメモリは減りません。キーとバリュー（"
    "{kv_gb:.3g} GB）はすべてデバイスのメモリに残り、コード（{codes_gb:.3g} GB）が加わります。一部"
    "（ホットセット）だけを残すか、ビット数を減らせば、必要なメモリは少なくなります。",
    "saved_context": "{context:,} トークンの文書 1 件に {questions} 個の質問をする場合、コンテキス"
    "トを保存すれば（ディスク {file_gb:.3g} GB）文書を読むのは 1 回で済みます。毎回読むと合計 "
    "{tokens:,} トークンになります。",
    "held": "すべてのキーとバリュー",
    "held_hot": "{share} のホットセット（残りはホストのメモリまたはファイル）",
    "held_bits": "すべてのキーとバリュー、{bits} ビット",
    "held_hot_bits": "{share} のホットセット、{bits} ビット",
    "windows": "{layers} 層のうち {windows} 層は一定の窓の中だけを参照します。計算に含めています"
    "が、スパースアテンションの対象にはなりません。",
    "experts": "1 トークンは {experts} 個のエキスパートのうち {chosen} 個を使うため、このバッチの"
    " 1 ステップが読む重みは約 {read:.0%} です。",
    "within_positions": "コンテキスト長を {positions:,} トークン以下にするか、より長いコンテキス"
    "トで学習されたモデルを使うこと。",
    "longer_context": "コンテキストが長い場合：{context:,} トークン以上ならパイロットの価値があり"
    "ます。",
    "longer_context_beyond": "コンテキストを長くして効果が出るのは {context:,} トークンからで、こ"
    "のモデルの上限 {positions:,} トークンを超えます。",
    "larger_batch": "バッチが大きい場合：同時に {batch:,} 系列以上ならパイロットの価値があります"
    "（{device} {devices:,} 台が必要）。",
    "smaller_weights": "重みを小さくした場合：{bits} ビットに量子化すると予測は {speedup:.2f} 倍"
    "です。",
    "shared_lists": "KV ヘッドを共有する {group} 個のクエリヘッドで 1 つのトークンリストを使う場"
    "合：予測は {speedup:.2f} 倍です。品質は少し下がります。",
    "nothing_changes": "コンテキスト、バッチ、重みのいずれを変えても判定は変わりません。予算 "
    "{budget:.2%} では、スパースなステップの読み出しや待ち時間が大きすぎます。予算を小さくして試"
    "してください。",
    "shorter_context": "コンテキストが短い場合：バッチ {batch:,} で {context:,} トークン未満なら"
    "パイロットの価値はなくなります。",
    "smaller_batch": "バッチが小さい場合：{context:,} トークンで {batch:,} 系列未満ならパイロット"
    "の価値はなくなります。",
    "fixed_cost": "{device} での固定コスト：スパースな 1 層 1 ステップあたり {spare_us:,.0f} マイ"
    "クロ秒増えると、効果はなくなります。",
    "other_device": "メモリ帯域の低いデバイスを使う場合：{device}（{devices:,} 台必要）では "
    "1 層あたり {spare_us:,.0f} マイクロ秒短縮でき、ホスト側の時間を上回ります。",
    "fits_on": "別のデバイスを使う場合：{device} なら 1 台にすべて収まります。",
    "host_bound": "カーネルを CUDA グラフにまとめない限り、スパースな 1 層にはホスト側で推定 "
    "{host_us:,.0f} マイクロ秒以上かかります。短縮できるのは {spare_us:,.0f} マイクロ秒なので、こ"
    "の条件では効果がホスト側の時間で失われるおそれがあります。",
    "fixed_cost_given": "{device} のメモリ帯域とバイト数に、指定されたスパース 1 層あたり "
    "{fixed_us:,.0f} マイクロ秒を加えて計算しています。1 層 1 ステップあたりの短縮は "
    "{spare_us:,.0f} マイクロ秒です。",
}

LABELS = {
    "kv_bytes_per_token": "1 トークンのキーとバリュー",
    "weights": "重み",
    "weights_read": "1 ステップで読む重み",
    "kv": "キーとバリュー",
    "code_bytes_per_token": "1 トークンのコード",
    "codes": "コード",
    "kv_share": "1 ステップのバイト数に占めるキーとバリュー",
    "ceiling": "アテンションの時間がゼロの場合の速度",
    "tokens_read": "クエリヘッド 1 個が読むトークン",
    "rows_share": "読み出すキーとバリューの行（最大）",
    "dense_bytes": "デンスな 1 ステップの読み出し",
    "sparse_bytes": "スパースな 1 ステップの読み出し",
    "bytes_speedup": "予算での速度（バイト数から）",
    "measured_speedup": "予算での速度（このマシンの実測から。1 倍を下回らない）",
    "dense_ms": "デンスな 1 ステップ",
    "sparse_ms": "スパースな 1 ステップ",
    "break_even": "スパースが速くなるコンテキスト長",
    "stored": "重み、キー、バリュー、コードのメモリ",
    "devices": "必要なデバイス",
    "longest_context": "1 台に収まる最長のコンテキスト",
    "largest_batch": "1 台に収まる最大のバッチ",
    "fixed_us": "スパースな 1 層の固定コスト",
    "dense_bandwidth": "デンスアテンションの読み出し速度",
    "weights_bandwidth": "行列ベクトル積の読み出し速度",
    "spare_us": "1 層 1 ステップあたりの短縮",
    "break_even_bytes": "スパースの読み出しが少なくなるコンテキスト長",
}
