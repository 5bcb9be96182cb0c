"""Train data/embedded/tokenizer.json: a 4,096-entry byte-level BPE.

Every word of the tasks is one token, with a leading space, `_` or `(` (identifiers and calls);
digits are tokenized in pairs.
"""

import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hashattn.evaluation.benchmarks import words
from hashattn.evaluation.benchmarks.corpus import paragraphs
from hashattn.evaluation.benchmarks.generated import TASKS, draw_facts

OUTPUT = Path(__file__).parents[1] / "embedded"
VOCABULARY = 4096
CONTEXT = 8192
BOS, PAD = "<s>", "<pad>"
PIECES = r"[ _(]?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"


def task_text() -> list[str]:
    """Lines of every task, enough for each word to earn a merge of its own."""
    rng = random.Random(0)
    sets = [draw_facts(task, 100, rng, "train") for task in TASKS for _ in range(400)]
    lines = [line for task_set in sets for line in task_set.facts]
    every_word = [w for group in vars(words).values() if isinstance(group, tuple) for w in group]
    lines += [f" {word}" for word in every_word for _ in range(400)]
    lines += [f"x_{word}" for word in words.OBJECTS for _ in range(400)]
    lines += [f"x({word}" for word in words.ANIMALS for _ in range(400)]
    return lines + [f" {n:02d}{m:02d}" for n in range(100) for m in range(100)]


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*paragraphs("train"), *task_text()], trainer)
    start = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[start]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, pad_token=PAD, model_max_length=CONTEXT
    )
    wrapped.save_pretrained(OUTPUT)
    print(f"{tokenizer.get_vocab_size()} tokens -> {OUTPUT}")


if __name__ == "__main__":
    main()
