"""English."""

TEXTS = {
    "page.eyebrow": "Pilot report: sparse attention on your own documents",
    "page.made": "{date} · model {model} ({note}) · {documents:count} documents read, "
    "{skipped:count} skipped",
    "page.contents": "In this report",
    "note.embedded": "the teaching model that comes with the package",
    "note.pretrained": "a pretrained model",
    "note.own": "your own model",
    "budget.one_of": "1 of {n} tokens",
    "budget.share": "{share} of the tokens",
    # page one
    "verdict.go": "Go",
    "verdict.go_with_fallback": "Go, with the fallback on",
    "verdict.no_go": "No go",
    "verdict.cannot_be_judged": "Cannot be judged",
    "means.go": "On these documents, reading only a part of a long text served as well as reading "
    "all of it, within what was allowed.",
    "means.go_with_fallback": "Reading only a part of a long text is worth using here, as long as "
    "steps that look risky fall back to reading all of it.",
    "means.no_go": "As it stands, reading only a part of a long text is not worth it here.",
    "means.cannot_be_judged": "This pilot could not tell. That is neither a yes nor a no: the "
    "reasons say what is missing.",
    "budget.name": "Budget to use",
    "budget.read": "Read {budget:budget}",
    "budget.none": "None is recommended",
    "reasons.title": "Why",
    "tiles.title": "Three figures",
    "next.title": "What to do next",
    "tile.quality": "Quality against full attention",
    "tile.quality.value": "{difference:points} points",
    "language.en": "in English",
    "language.ja": "in Japanese",
    "tile.quality.text": "At {budget:budget}: {measure:name measure}, from {low:points} to "
    "{high:points} points of 100 ({count:count} {measure:name unit}): {found}.",
    "tile.fidelity.value": "{agreement:percent}",
    "tile.fidelity.text": "of next tokens are those of full attention at {budget:budget} "
    "({documents:count} texts); KL {kl:ratio}, from {low:ratio} to {high:ratio}.",
    "tile.quality.cannot": "Nothing here told the model's answers from guessing, so what sparse "
    "attention costs in quality is not known.",
    "tile.quality.none": "No text was long enough to measure it.",
    "tile.memory": "Memory for the codes",
    "tile.memory.text": "on top of a KV cache of {kv:size} at {context:count} tokens. The cache "
    "does not shrink: less of it is read.",
    "tile.cost": "Device hours, predicted",
    "tile.cost.value": "{dense:ratio} → {sparse:ratio}",
    "tile.cost.text": "{period}, from full to sparse attention{money}. Arithmetic, not a "
    "measurement.",
    "tile.cost.period": "In {days:count} days at {tokens:count} tokens a day",
    "tile.cost.period_untold": "For the stated traffic",
    "tile.cost.money": ": {dense:ratio} → {sparse:ratio} {currency} at {price} an hour",
    "tile.cost.money_untold": ": {dense:ratio} → {sparse:ratio} {currency}",
    "tile.speed": "Time for a token, measured here",
    "tile.speed.faster": "{speedup:ratio}× faster",
    "tile.speed.slower": "{slowdown:ratio}× slower",
    "tile.speed.same": "No difference found",
    "tile.speed.text": "At {budget:budget}: {ms:ratio} ms instead of {dense:ratio} ms at "
    "{context:count} tokens, {steps:count} steps.",
    "tile.speed.none": "Not measured",
    "tile.speed.none.text": "Neither a time on this machine nor a price and traffic were given.",
    "unknown": "Not known",
    # findings
    "finding.kept": "kept",
    "finding.lost": "lost",
    "finding.open": "not clear yet",
    "finding.cannot_be_judged": "cannot be judged",
    "explain.kept": "Kept: the whole interval lies within what was allowed.",
    "explain.lost": "Lost: the whole interval lies outside what was allowed.",
    "explain.open": "Not clear yet: the interval holds both; more questions or documents would "
    "narrow it.",
    "explain.allowed": "Allowed before measuring: {tolerance:score} points of 100, and a KL of "
    "{kl:ratio}.",
    "explain.cannot_be_judged": "Cannot be judged: the model by itself was not told from guessing.",
    "found.none": "no difference found",
    "found.lower": "lower than full attention",
    "found.higher": "higher than full attention",
    "measure.questions": "answers to your questions",
    "measure.quotes": "completed sentences of your documents",
    "measure.fidelity": "likeness to full attention",
    "unit.questions": "questions",
    "unit.quotes": "sentences",
    "measure.text": "how well the model predicts the text",
    "unit.text": "texts",
    "range.points": "from {low:points} to {high:points}",
    "range.ratio": "from {low:ratio} to {high:ratio}",
    # quality
    "quality.title": "Quality and how much is read",
    "quality.intro": "Sparse attention reads a part of the text for each word that it writes. "
    "Each row is one budget: how much it may read. Full attention (also called dense) reads "
    "everything.",
    "quality.none": "Nothing was measured: there was not enough text.",
    "quality.questions": "Answers to your questions",
    "quality.quotes": "Completing sentences of your documents",
    "quality.fidelity": "Likeness to full attention, word by word",
    "column.budget": "Budget",
    "column.read": "Really read",
    "column.full": "Full attention",
    "column.sparse": "Sparse",
    "column.difference": "Difference",
    "column.found": "In words",
    "column.count.questions": "Questions",
    "column.count.quotes": "Sentences",
    "column.same": "Very same answer",
    "column.finding": "Finding",
    "column.kl": "KL divergence",
    "column.agreement": "Same next token",
    "column.perplexity": "Perplexity, times",
    "column.free": "Same tokens when it writes on",
    "column.documents": "Texts",
    "more.untold": "how many more are needed cannot be told",
    "more.questions": "needs about {more:count} questions in all",
    "more.quotes": "needs about {more:count} sentences in all",
    "more.documents": "needs about {more:count} texts in all",
    "difference.note": "{range}; {found}",
    "free.of": "{same:ratio} of {new:count}",
    "quality.points_note": "Scores are points of 100. Intervals are 95% bootstrap intervals over "
    "the texts that {measure:name unit} are about.",
    "quality.fidelity_note": "KL: how far the probabilities of the next token move, in nats; 0 is "
    "no change. Intervals are 95% bootstrap intervals over texts.",
    "cut.none": "Documents cut, or read in parts, to fit the model's context: 0 of {of:count}.",
    "cut.some": "Documents cut, or read in parts, to fit the model's context: {contexts:count} of "
    "{of:count}; answers lost by that: {lost:count}. No method can find those.",
    "cut.some_untold": "Documents cut, or read in parts, to fit the model's context: "
    "{contexts:count} of {of:count}; how many answers were lost by that is not known.",
    "cut.unknown": "Whether documents were cut to fit the model's context was not recorded.",
    "cannot.curve": "{measure:name heading}: cannot be judged, so no curve is drawn. The model by "
    "itself was not told from guessing.",
    "heading.questions": "Answers to your questions",
    "heading.quotes": "Completing sentences of your documents",
    "heading.fidelity": "Likeness to full attention",
    "figure.score.title": "{measure:name heading}, points of 100",
    "figure.score.caption": "Across: share of the text that is read. Up: points of 100. Bars show "
    "the interval of the difference to full attention. {count:count} {measure:name unit}.",
    "figure.score.alt": "Score against share read. Full attention {dense:score}, guessing "
    "{guess:score}; sparse: {points}.",
    "figure.point.score": "{budget:fraction} read {sparse:score}",
    "figure.kl.title": "KL divergence from full attention",
    "figure.kl.caption": "Across: share of the text that is read. Up: KL in nats, less is closer. "
    "Bars show the interval. {documents:count} texts.",
    "figure.kl.alt": "KL divergence against share read: {points}.",
    "figure.point.kl": "{budget:fraction} read {kl:ratio}",
    "figure.latency.title": "Milliseconds for one token",
    "figure.latency.caption": "Measured on {device} at {context:count} tokens, {steps:count} "
    "steps; 1/1 is full attention. Median; the line spans low to high.",
    "figure.latency.alt": "Milliseconds for one token. Full attention {dense:ratio}; sparse: "
    "{points}.",
    "figure.point.latency": "{budget:fraction} read {ms:ratio}",
    "figure.memory.title": "Megabytes read for one token",
    "figure.memory.caption": "Keys and values that one step reads at {context:count} tokens, and "
    "the codes, all of which are read; 1/1 is full attention. Computed from the budgets. All "
    "{kv:size} of the cache stay in memory.",
    "figure.memory.alt": "Bytes read for one token. Full attention {kv:size}; sparse: {points}.",
    "figure.point.memory": "{budget:fraction} read {bytes:size}",
    "key.sparse": "sparse, with interval",
    "key.full": "full attention",
    "key.everything": "full attention",
    "key.guess": "guessing",
    "key.cache": "keys and values",
    "key.codes": "codes",
    # floors
    "floors.title": "Can this model answer at all?",
    "floors.intro": "Before sparse attention is judged, the model itself is: reading everything, "
    "does it do better than guessing? Where it does not, no attention method will help, and "
    "nothing that rests on those answers is judged.",
    "floors.caption": "The model itself, reading everything",
    "floors.column.what": "What was asked of it",
    "floors.column.model": "The model",
    "floors.column.guess": "Guessing",
    "floors.column.difference": "Difference",
    "floors.column.count": "Sample",
    "floors.column.clear": "Better than guessing?",
    "floors.questions": "Answering your questions (points of 100)",
    "floors.quotes": "Completing sentences of your documents (points of 100)",
    "floors.text": "Predicting the text (bits per byte; guessing is a file compressor; less is "
    "better)",
    "floors.clear": "yes",
    "floors.unclear": "not told from guessing",
    "floors.absent": "not measured",
    # documents
    "documents.title": "Documents",
    "documents.intro": "{scored:count} scored, {calibration:count} used to fit the codes and "
    "never scored, {unused:count} not used, {skipped:count} skipped.",
    "documents.none": "No document was read.",
    "documents.read": "Documents read",
    "documents.name": "Document",
    "documents.use": "Used for",
    "documents.kind": "Kind",
    "documents.characters": "Characters",
    "documents.tokens": "Tokens",
    "documents.cut": "Cut",
    "documents.yes": "yes",
    "documents.no": "no",
    "use.scored": "scoring",
    "use.calibration": "fitting the codes",
    "use.unused": "nothing",
    "documents.skipped": "Skipped files",
    "documents.reason": "Why",
    "documents.first": "The first {shown:count} of {all:count}; all are in pilot.json.",
    "shortened": "Long texts are shortened; pilot.json holds the whole.",
    # changed
    "changed.title": "Answers that changed",
    "changed.intro": "Questions whose answer differs between full and sparse attention. The audit "
    "page shows which passages were read and which were missed.",
    "changed.none": "No answer that was compared changed.",
    "changed.none_asked": "No questions were asked, so no answers were compared.",
    "changed.caption": "Question by question",
    "changed.question": "Question",
    "changed.expected": "Expected",
    "changed.full": "Full attention",
    "changed.sparse": "Sparse",
    "changed.audit": "Audit",
    "changed.open": "open",
    "changed.right": "{text} (right)",
    "changed.wrong": "{text} (wrong)",
    "changed.or": " / ",
    "changed.in": "{question} (in {document})",
    "changed.empty": "(no answer)",
    # speed and memory
    "speed.title": "Time and memory",
    "speed.none": "No time was measured on this machine.",
    "speed.caption": "Time for one token on {device}, at {context:count} tokens, {steps:count} "
    "steps",
    "speed.ms": "Milliseconds, median",
    "speed.speedup": "Against full attention",
    "speed.full": "full attention",
    "speed.times": "{speedup:ratio}×",
    "speed.below": "Stays dense",
    "speed.below.tokens": "below {tokens:count} tokens",
    "speed.below.any": "at any length",
    "speed.note": "A measurement on this machine at this length. On other machines and at other "
    "lengths it differs; the pre-flight computes what is possible there. Below the length from "
    "which a sparse step was no slower on this machine, decoding stays dense, and its time is that "
    "of dense steps.",
    "speed.saved": "Reading the {context:count} tokens took {once:ratio} s. Once the context is "
    "saved, {questions} questions over it cost that once, not each time ({each:ratio} s).",
    "memory.caption": "Memory at {context:count} tokens",
    "memory.what": "What",
    "memory.token": "A token",
    "memory.all": "In all",
    "memory.share": "Share of the cache",
    "memory.kv": "Keys and values (KV cache)",
    "memory.codes": "Codes, in addition",
    "memory.note": "Here keys and values all stayed in memory; sparse attention read less of them. "
    "The pre-flight counts what hot sets and fewer bits take.",
    # codes
    "codes.title": "Codes",
    "codes.none": "No codes were made.",
    "codes.intro": "A code is a short fingerprint of each token, by which those worth reading are "
    "found.",
    "codes.method": "Method",
    "codes.method.hash": "learned hash",
    "codes.method.transform": "calibrated transform",
    "codes.bits": "Bits in a code",
    "codes.origin": "Where they come from",
    "codes.origin.shipped": "delivered with the model",
    "codes.origin.calibrated": "calibrated on your documents (those not scored)",
    "codes.origin.trained": "trained on your documents (those not scored)",
    "codes.tokens": "Tokens of your text they were fitted to",
    "codes.bytes": "Bytes for a token",
    "codes.mass": "Attention found by the codes",
    "codes.mass_of_exact": "Attention found by an exact search",
    "codes.mass_before": "Attention found before fitting to your text",
    # pre-flight
    "preflight.title": "Pre-flight: what could be gained at most",
    "preflight.none": "No pre-flight was computed.",
    "preflight.worth": "Worth a pilot.",
    "preflight.marginal": "Marginal.",
    "preflight.no": "Not worth a pilot.",
    "preflight.changes": "What would change it",
    "preflight.caption": "The arithmetic",
    "preflight.line": "Quantity",
    "preflight.value": "Value",
    "quantity.bytes": "{value:size}",
    "quantity.bytes a second": "{value:size} a second",
    "quantity.share": "{value:percent}",
    "quantity.times": "{value:ratio}×",
    "quantity.tokens": "{value:count} tokens",
    "quantity.devices": "{value:count}",
    "quantity.sequences": "{value:count} sequences",
    "quantity.ms": "{value:ratio} ms",
    "quantity.us": "{value:ratio} µs",
    "holdings.caption": "The cache on the device, codes included",
    "holdings.what": "What stays there",
    "holdings.bytes": "Memory",
    "holdings.longest": "Longest context on one device, tokens",
    "cost.caption": "Predicted cost",
    "cost.what": "What",
    "cost.full": "Full attention",
    "cost.sparse": "Sparse",
    "cost.hours": "Device hours",
    "cost.money": "Money ({currency})",
    "cost.given": "Given: {tokens:count} tokens a day for {days:count} days, {price} {currency} "
    "for a device hour. Predicted by arithmetic, not measured: writing answers alone, without "
    "reading prompts and without idle time.",
    "cost.given_untold": "Predicted by arithmetic from the price and traffic that were given, not "
    "measured: writing answers alone, without reading prompts and without idle time.",
    "cost.none": "No price and traffic were given, so no cost was computed.",
    # monitor, privacy
    "monitor.title": "What to watch, and when to fit the codes again",
    "monitor.none": "Nothing is in use, so there is nothing to watch.",
    "private.title": "Privacy",
    "private.here": "The pilot works on this machine alone: documents, questions and answers are "
    "read from its disk, and this page holds them and loads nothing. Whoever has this page can "
    "read the texts shown in it.",
    "private.sockets": "Connections to the network were denied to the process while it ran.",
    "private.sockets_not": "Connections to the network were not denied to the process in this run.",
    "private.offline": "The libraries ran in their offline mode.",
    "private.offline_not": "The libraries did not run in their offline mode: models may have been "
    "fetched. This package sends no documents.",
    # reproduce
    "reproduce.title": "How to run this again",
    "reproduce.intro": "This command, with the same files, version and model, repeats the pilot. "
    "Numbers in full are in pilot.json.",
    "reproduce.again": "This report in Japanese, from the same numbers:",
    "reproduce.use": "What was recommended, in your own code (codes that did not come with the "
    "model are in the folder of this report):",
    "reproduce.settings": "Settings",
    "reproduce.facts": "Versions and machine",
    "reproduce.name": "Name",
    "reproduce.value": "Value",
    "fact.date": "Date",
    "fact.version": "Package version",
    "fact.code": "Code (SHA-256)",
    "fact.model": "Model",
    "fact.model_sha256": "Model (SHA-256)",
    "fact.seconds": "The run took",
    "fact.cores": "Cores",
    "fact.gpu": "GPU",
    "fact.memory_gib": "Memory (GiB)",
    "fact.processor": "Processor",
    "fact.system": "System",
    "fact.threads": "Threads",
    "value.none": "none",
    # next steps, by the key of a reason
    "next.verdict.go": "Serve a small share of real traffic at this budget, beside full "
    "attention, and compare.",
    "next.verdict.go_with_fallback": "Serve a small share of real traffic at this budget with the "
    "fallback on, and watch how often it is used.",
    "next.verdict.no_go": "Keep full attention. Run the pilot again when one of the reasons above "
    "no longer holds.",
    "next.quality_lost": "Try a larger budget, or codes trained on more of your text.",
    "next.fidelity_lost": "Try a larger budget, or codes trained on more of your text.",
    "next.quality_open.quotes": "Add documents: about {more:count} sentences in all would give a "
    "firm answer.",
    "next.quality_open.quotes_untold": "Add documents.",
    "next.quality_open": "Add questions: about {more:count} in all would give a firm answer.",
    "next.quality_open_untold": "Add questions with answers.",
    "next.fidelity_open": "Add documents: about {more:count} in all would give a firm answer.",
    "next.fidelity_open_untold": "Add documents.",
    "next.dense_cannot_answer": "Choose a model that can answer these questions when it reads "
    "everything, then run the pilot again.",
    "next.text_not_predicted": "Check that the documents are text in a language that the model "
    "knows, or choose another model.",
    "next.nothing_to_judge": "Give more or longer documents.",
    "next.contexts_cut": "Choose a model with a longer context, or shorter documents.",
    "next.model_is_embedded": "Run the pilot again with the model that you would serve "
    "(MODEL=...).",
    "next.preflight_no": "Look at longer contexts, larger batches or another device: see the "
    "pre-flight.",
    "next.slower_here": "Measure on the device that you would serve from.",
    "next.not_judged": "Choose a model that does these tasks when it reads everything, then run "
    "the pilot again.",
}

SENTENCES = {
    "quality_kept": "Reading {budget:budget}, the quality of {measure:name measure} is kept: "
    "{difference:points} points of 100 against full attention, and a loss of more than {low:loss} "
    "is unlikely ({count:count} {measure:name unit}).",
    "quality_open": "Reading {budget:budget}, it is not clear yet whether the quality of "
    "{measure:name measure} holds: {difference:points} points of 100 against full attention, but "
    "up to {low:loss} may be lost ({count:count} {measure:name unit}; about {more:count} would "
    "give a firm answer).",
    "quality_open_untold": "Reading {budget:budget}, it is not clear yet whether the quality of "
    "{measure:name measure} holds: {difference:points} points of 100 against full attention, but "
    "up to {low:loss} may be lost ({count:count} {measure:name unit}).",
    "quality_lost": "Reading {budget:budget}, the quality of {measure:name measure} is lost: "
    "{difference:points} points of 100 against full attention, and perhaps as many as {low:loss} "
    "({count:count} {measure:name unit}).",
    "fidelity_kept": "Reading {budget:budget}, the model writes as with full attention: "
    "{agreement:percent} of next tokens are the same (KL {kl:ratio}, {documents:count} texts).",
    "fidelity_open": "Reading {budget:budget}, it is not clear yet whether the model writes as "
    "with full attention: KL {kl:ratio}, perhaps {kl_high:ratio} ({documents:count} texts; "
    "about {more:count} would give a firm answer).",
    "fidelity_open_untold": "Reading {budget:budget}, it is not clear yet whether the model "
    "writes as with full attention: KL {kl:ratio}, perhaps {kl_high:ratio} ({documents:count} "
    "texts).",
    "fidelity_lost": "Reading {budget:budget}, the model no longer writes as with full attention: "
    "{agreement:percent} of next tokens are the same (KL {kl:ratio}, {documents:count} texts).",
    "dense_cannot_answer": "The model itself was not told from guessing at "
    "{measure:name measure}, even when it reads everything: {dense:score} points of 100, guessing "
    "{guess:score} ({count:count} {measure:name unit}). No attention method will help: it is the "
    "model, or the documents.",
    "text_not_predicted": "The model predicts this text no better than a file compressor does "
    "({dense:ratio} against {guess:ratio} bits per byte, {count:count} documents): it does not "
    "know this kind of text.",
    "nothing_to_judge": "There was too little to judge {measure:name measure} by: {count:count} "
    "{measure:name unit}, where {least:count} are needed.",
    "not_judged": "What reading less costs in {measure:name measure} cannot be judged: the model "
    "itself was not told from guessing there.",
    "preflight_no": "There is too little to gain: the pre-flight expects this traffic to run at "
    "{speedup:ratio} times its present speed. Even attention that took no time would give "
    "{ceiling:ratio} times, as keys and values are {share:percent} of what a step reads.",
    "preflight_marginal": "What there is to gain is small or uncertain: the pre-flight counts on "
    "at most {speedup:ratio} times the present speed (attention that took no time: {ceiling:ratio} "
    "times; keys and values are {share:percent} of what a step reads).",
    "preflight_worth": "There is something to gain: the pre-flight expects this traffic to run at "
    "{speedup:ratio} times its present speed (attention that took no time: {ceiling:ratio} times; "
    "keys and values are {share:percent} of what a step reads).",
    "language_left_out": "{count:count} questions ({language:name language}) are left out of the "
    "verdict: the model itself was not told from guessing there ({dense:score} points of 100, "
    "guessing {guess:score}).",
    "questions_withheld": "{count:count} questions were not asked: the documents that they are "
    "about are kept for the codes.",
    "questions_beyond": "{count:count} more questions were not asked, to save time: raise "
    '"questions" in the samples of the pilot to ask them.',
    "contexts_cut": "{contexts:count} of {of:count} documents did not fit the model's context and "
    "were cut or read in parts; answers lost by that, which no method can find: "
    "{answers_lost:count}.",
    "model_is_embedded": "This ran on the small teaching model that comes with the package (4.6 "
    "million parameters): its answers say nothing about a model that you would serve.",
    "slower_here": "On this machine, at {context:count} tokens, sparse attention was not faster "
    "({speedup:ratio} times the speed of full attention).",
    "faster_here": "On this machine, at {context:count} tokens, sparse attention was "
    "{speedup:ratio} times as fast as full attention.",
    "dense_here": "On this machine sparse attention gains nothing below {dense_below:count} "
    "tokens: at {context:count} tokens decoding stays dense, in the time that it takes now.",
    "never_faster_here": "On this machine sparse attention gains nothing at any length that the "
    "model reads: decoding stays dense, in the time that it takes now.",
    # what to watch
    "watch_drift": "Run the drift monitor on real traffic. An alarm says that traffic no longer "
    "looks like the text these numbers were measured on.",
    "watch_receipt": "Keep the receipts. Each says how much was really read; it should stay near "
    "{budget:budget}.",
    "watch_fallback": "Count how often the fallback reads everything. A rising share means that "
    "the codes fit the traffic less well.",
    "retrain_when": "Fit the codes again when they find less than {mass:percent} of the "
    "attention, or after a drift alarm.",
    "recheck_when": "Run this pilot again after a change of the model, of the codes, or of the "
    "kind of documents.",
}
