"""What a Hugging Face model is to hashattn.

families: where model families differ, and the one file to change for a new one: names of
arguments, projections and configuration fields, kinds of layers, head counts, logit caps, softmax
sinks. structure: a model's attention modules, its full-attention layers and the heads a process
holds. heads: a part of the heads under tensor parallelism. dense: the model's own attention.
support: which models are refused, and why. identity: every hash that says which code, model and
tokenizer this is.
"""
