"""The pre-flight's words in English; templates take a note's values through str.format."""

VERDICTS = {
    "worth": "Worth a pilot",
    "marginal": "Marginal",
    "no": "No: sparse attention will not pay off here",
}


SENTENCES = {
    "beyond_positions": "The context of {context:,} tokens is longer than the model's "
    "{positions:,} positions, so the model cannot read it whatever attention it uses.",
    "attention_is_small": "Keys and values are only {share:.1%} of the bytes that a decode step "
    "reads at {context:,} tokens and batch {batch:,}: even attention that takes no time would "
    "make answers {ceiling:.2f}x as fast at most.",
    "little_gained": "Keys and values are {share:.0%} of the bytes that a decode step reads at "
    "{context:,} tokens and batch {batch:,} (at most {ceiling:.2f}x), but at a budget of "
    "{budget:.2%} only {speedup:.2f}x is predicted.",
    "slower": "Keys and values are {share:.0%} of the bytes that a decode step reads at "
    "{context:,} tokens and batch {batch:,} (at most {ceiling:.2f}x), but at a budget of "
    "{budget:.2%} a sparse step is predicted to be slower than a dense one: {sparse:.2f}x.",
    "dense_below": "Decoding would stay dense below {tokens:,} tokens (attach's dense_below), and "
    "take the time that it takes now.",
    "never_sparse": "Decoding would stay dense at any length (attach's dense_below), and take the "
    "time that it takes now.",
    "some_gained": "Keys and values are {share:.0%} of the bytes that a decode step reads at "
    "{context:,} tokens and batch {batch:,} (at most {ceiling:.2f}x); at a budget of {budget:.2%}"
    ", {speedup:.2f}x is predicted.",
    "much_gained": "Keys and values are {share:.0%} of the bytes that a decode step reads at "
    "{context:,} tokens and batch {batch:,} (at most {ceiling:.2f}x); at a budget of {budget:.2%}"
    ", {speedup:.2f}x is predicted for the whole step.",
    "measured_here": "Predicted from hashattn's kernels timed on this machine with up to "
    "{tokens:,} cached tokens: {dense_ms:.3g} ms a step dense (its own dense kernel, often "
    "faster than torch's), {sparse_ms:.3g} ms sparse; what Python and the rest of the model add "
    "is not in it.",
    "bandwidth_alone": "Counted from bytes at the bandwidth of {device}; fixed costs of a step "
    "(launches, host time) are not counted, because nothing was measured on it. The difference "
    "between dense and sparse is {spare_us:,.0f} microseconds a layer and step.",
    "fits": "Weights, keys, values and codes are {needed_gb:.3g} GB and fit on one {device} ("
    "{memory_gb:.3g} GB, {usable:.0%} of it used).",
    "does_not_fit": "Weights, keys, values and codes are {needed_gb:.3g} GB: more than one "
    "{device} holds ({memory_gb:.3g} GB, {usable:.0%} of it used). It takes {devices:,}, with "
    "dense attention as with sparse.",
    "memory_not_saved": "Reading less alone saves no memory: all keys and values ({kv_gb:.3g} GB) "
    "stay in device memory, and the codes come on top ({codes_gb:.3g} GB). Less is needed there "
    "where only a hot set of them stays, or where they take fewer bits.",
    "saved_context": "{questions} questions over one document of {context:,} tokens read it once "
    "from a saved context ({file_gb:.3g} GB on disk); reading it for each takes {tokens:,} tokens.",
    "held": "all keys and values",
    "held_hot": "a hot set of {share}, the rest in host memory or a file",
    "held_bits": "all keys and values, in {bits} bits",
    "held_hot_bits": "a hot set of {share}, in {bits} bits",
    "windows": "{windows} of the {layers} layers attend to a window only; they are counted, and "
    "sparse attention leaves them as they are.",
    "experts": "A token uses {chosen} of {experts} experts, so a step of this batch reads about "
    "{read:.0%} of the weights.",
    "within_positions": "A context of at most {positions:,} tokens, or a model that was trained "
    "for longer ones.",
    "longer_context": "A longer context: worth a pilot from {context:,} tokens on.",
    "longer_context_beyond": "A longer context would help only from {context:,} tokens on, more "
    "than the {positions:,} positions of this model.",
    "larger_batch": "A larger batch: worth a pilot from {batch:,} sequences at a time on, which "
    "take {devices:,} x {device}.",
    "smaller_weights": "Smaller weights: quantised to {bits} bits, {speedup:.2f}x is predicted.",
    "shared_lists": "One list of tokens for the {group} query heads that share a KV head: "
    "{speedup:.2f}x is predicted, at some loss of quality.",
    "nothing_changes": "No longer context, larger batch or smaller weights: at a budget of "
    "{budget:.2%} the sparse step reads, or waits, too much. Try a smaller budget.",
    "shorter_context": "A shorter context: below {context:,} tokens at batch {batch:,} it is "
    "worth a pilot no more.",
    "smaller_batch": "A smaller batch: below {batch:,} sequences at {context:,} tokens it is "
    "worth a pilot no more.",
    "fixed_cost": "Fixed costs on {device}: {spare_us:,.0f} microseconds more a sparse layer and "
    "step would leave no gain.",
    "other_device": "Slower memory: the same step gains {spare_us:,.0f} microseconds a layer on "
    "{device} (it takes {devices:,}), more than the host takes.",
    "fits_on": "Another device: one {device} would hold all of it.",
    "host_bound": "Unless its kernels are captured in a CUDA graph, a sparse layer takes an "
    "estimated {host_us:,.0f} microseconds of host time or more, and {spare_us:,.0f} are to be "
    "gained: at this workload the host may use it up.",
    "fixed_cost_given": "Counted from bytes at the bandwidth of {device}, and {fixed_us:,.0f} "
    "microseconds more for each sparse layer, as given; {spare_us:,.0f} are gained a layer and "
    "step.",
}

LABELS = {
    "kv_bytes_per_token": "keys and values a token",
    "weights": "weights",
    "weights_read": "weights read in a step",
    "kv": "keys and values",
    "code_bytes_per_token": "codes a token",
    "codes": "codes",
    "kv_share": "keys and values, share of a step's bytes",
    "ceiling": "speed-up if attention took no time",
    "tokens_read": "tokens read by a query head",
    "rows_share": "rows of K and V read, at most",
    "dense_bytes": "read in a dense step",
    "sparse_bytes": "read in a sparse step",
    "bytes_speedup": "speed-up at the budget, by bytes",
    "measured_speedup": "speed-up at the budget, by times measured here, never below 1",
    "dense_ms": "dense step",
    "sparse_ms": "sparse step",
    "break_even": "sparse is faster from a context of",
    "stored": "memory for weights, keys, values and codes",
    "devices": "devices needed",
    "longest_context": "longest context on one device",
    "largest_batch": "largest batch on one device",
    "fixed_us": "fixed cost of a sparse layer",
    "dense_bandwidth": "dense attention reads",
    "weights_bandwidth": "matrix-vector product reads",
    "spare_us": "gained a layer and step",
    "break_even_bytes": "sparse reads less from a context of",
}
