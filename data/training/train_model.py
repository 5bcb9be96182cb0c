"""Train the embedded model: `make model`. About 45 minutes on one CPU core (AVX-512), 4.9 M tokens.

Sequences grow longer by stages; each holds facts in natural text and asks for many of them at its
end. The loss counts answers fully, natural text a little, everything else not at all. Positions
are skipped at random so that short sequences see far offsets. Stages are saved; a rerun goes on
after the last one.
"""

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hashattn.evaluation.benchmarks.corpus import paragraphs
from hashattn.evaluation.benchmarks.generated import TASKS, draw_facts
from structured_init import structure

EMBEDDED = Path(__file__).parents[1] / "embedded"
CONTEXT = 8192
TEXT_WEIGHT = 0.05  # weight of natural text in the loss, answers have 1
TEXT_SHARE = 0.15  # share of the natural text's tokens that the loss looks at
MUON_LR, ADAM_LR, NORM_LR = 0.008, 0.004, 0.002


@dataclass(frozen=True)
class Stage:
    """`steps` of `batch` sequences of `length` tokens; learning rate factor `start` to `end`."""

    length: int
    batch: int
    steps: int
    start: float = 1.0
    end: float = 1.0


STAGES = (
    Stage(256, 16, 300),
    Stage(512, 8, 250),
    Stage(1024, 4, 240, 0.7, 0.5),
    Stage(2048, 2, 120, 0.5, 0.35),
    Stage(4096, 1, 160, 0.35, 0.15),
    Stage(8192, 1, 60, 0.15, 0.02),
)


def build_config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, rms_norm_eps=1e-5,
        max_position_embeddings=CONTEXT, tie_word_embeddings=False, bos_token_id=0,
        eos_token_id=None, pad_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e10},
    )  # fmt: skip


class Sequences:
    """Training sequences without end: token ids and loss weights."""

    def __init__(self, tokenizer, seed: int):
        self.encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        self.text = [self.encode(p + "\n") for p in paragraphs("train")]
        self.rng = random.Random(seed)
        self.bos = tokenizer.bos_token_id

    def one(self, length: int) -> tuple[list[int], list[float]]:
        rng = self.rng
        tasks = rng.sample(TASKS, rng.choice((1, 2, 3, 6, 6)))
        share = rng.uniform(0.1, 0.4)  # of the tokens that facts take; questions take as much again
        size = max(2, int(length * share / 8 / len(tasks)))
        sets = [draw_facts(task, size, rng, "train") for task in tasks]
        questions = [question for task_set in sets for question in task_set.questions]
        facts = [self.encode(line + "\n") for task_set in sets for line in task_set.facts]
        rng.shuffle(questions)
        tail, weights = [], []  # questions and answers
        room = length - 1 - sum(map(len, facts))
        for question in questions:
            prompt, answer = self.encode("Q: " + question.text), self.encode(question.answer + "\n")
            if len(tail) + len(prompt) + len(answer) > room:
                break
            tail += prompt + answer
            weights += [0.0] * len(prompt) + [1.0] * len(answer)
        body = [(ids, 0.0) for ids in facts]
        room -= len(tail)
        while room > 0:
            paragraph = rng.choice(self.text)
            if len(paragraph) > room:  # the end of a paragraph, so that the line still ends
                paragraph = paragraph[-room:]
            body.append((paragraph, TEXT_WEIGHT))
            room -= len(paragraph)
        rng.shuffle(body)
        ids = [self.bos] + [i for line, _ in body for i in line] + tail
        weight = [0.0] + [w for line, w in body for _ in line] + weights
        return ids[:length], weight[:length]

    def batch(self, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = zip(*(self.one(length) for _ in range(count)), strict=True)
        return torch.tensor(ids), torch.tensor(weights)

    def positions(self, count: int, length: int) -> torch.Tensor:
        """Rising positions (count, length) int64 with up to six jumps, below the context length."""
        steps = torch.ones(count, length, dtype=torch.long)
        steps[:, 0] = 0
        for row in range(count):
            spare = self.rng.randrange(CONTEXT - length + 1)
            cuts = sorted(self.rng.randrange(spare + 1) for _ in range(self.rng.randrange(7)))
            for low, high in zip([0, *cuts], cuts, strict=False):
                steps[row, self.rng.randrange(1, length)] += high - low
        return steps.cumsum(1)


def hidden_states(model: LlamaForCausalLM, ids: torch.Tensor, positions: torch.Tensor):
    """Final hidden states (batch, length, hidden) of ids at rising positions, (batch, length) both.

    `model(position_ids=...)` would take a jump for a border of packed sequences and mask across it.
    """
    x = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(x, positions)
    for layer in model.model.layers:
        x = layer(x, position_embeddings=rotary)
        x = x[0] if isinstance(x, tuple) else x
    return model.model.norm(x)


def loss_and_accuracy(model, ids, weights, positions):
    """Weighted cross-entropy, the mean of answers alone, and the share of answer tokens predicted
    right; ids, weights and positions (batch, length)."""
    targets, weights = ids[:, 1:], weights[:, 1:]
    keep = (weights == 1) | ((weights > 0) & (torch.rand_like(weights) < TEXT_SHARE))
    weight = torch.where(weights == 1, weights, weights / TEXT_SHARE)[keep]
    hidden = hidden_states(model, ids, positions)[:, :-1][keep]
    logits, target = model.lm_head(hidden).float(), targets[keep]
    losses = F.cross_entropy(logits, target, reduction="none")
    answer = weights[keep] == 1
    right = (logits.argmax(-1) == target)[answer].float().mean()
    return (losses * weight).sum() / weight.sum(), losses[answer].mean().item(), right.item()


def optimizers(model) -> list[torch.optim.Optimizer]:
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.dim() == 2 and "layers" in n]
    tables = [p for n, p in named if p.dim() == 2 and "layers" not in n]
    norms = [p for _, p in named if p.dim() == 1]
    adam = [{"params": tables, "lr": ADAM_LR}, {"params": norms, "lr": NORM_LR}]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=0.01)
    return [muon, torch.optim.AdamW(adam, betas=(0.9, 0.95), weight_decay=0.0)]


def train_stage(model, sequences: Sequences, stage: Stage, warm: int, device, log) -> None:
    optimiser = optimizers(model)
    base = [[group["lr"] for group in o.param_groups] for o in optimiser]
    began, ema = time.time(), [None, None]
    for step in range(stage.steps):
        factor = stage.start + (stage.end - stage.start) * step / stage.steps
        factor *= min(1.0, (step + 1) / warm)
        ids, weights = sequences.batch(stage.batch, stage.length)
        skipped = sequences.rng.random() < 0.7
        positions = torch.arange(stage.length).expand(stage.batch, -1)
        if skipped:
            positions = sequences.positions(stage.batch, stage.length)
        with torch.autocast(device.type, torch.bfloat16):
            loss, answer_loss, right = loss_and_accuracy(
                model, ids.to(device), weights.to(device), positions.to(device)
            )
        loss.backward()
        for o, rates in zip(optimiser, base, strict=True):
            for group, rate in zip(o.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            o.step()
            o.zero_grad(set_to_none=True)
        for i, value in enumerate((answer_loss, right)):
            ema[i] = value if ema[i] is None else 0.95 * ema[i] + 0.05 * value
        if step % 20 == 19:
            rate = (step + 1) * stage.batch * stage.length / (time.time() - began)
            log(f"L {stage.length} step {step + 1}/{stage.steps} answer loss {ema[0]:.3f} "
                f"tokens right {ema[1]:.3f} {rate:.0f} tokens/s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("results/model"))
    parser.add_argument("--output", type=Path, default=EMBEDDED)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="plain initialisation instead")
    parser.add_argument("--stages", type=json.loads, help="JSON list of stages to run instead")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED, local_files_only=True)
    model = LlamaForCausalLM(build_config(len(tokenizer)))
    if not arguments.plain:
        structure(model, arguments.seed)
    model.to(device)
    stages = [Stage(**s) for s in arguments.stages] if arguments.stages else STAGES
    for number, stage in enumerate(stages):
        saved = arguments.work / f"stage{number}.pt"
        if saved.exists():
            model.load_state_dict(torch.load(saved, map_location=device, weights_only=True))
            print(f"reused stage {number}: {asdict(stage)}", flush=True)
            continue
        print(f"stage {number}: {asdict(stage)}", flush=True)
        torch.manual_seed(arguments.seed + number)
        sequences = Sequences(tokenizer, arguments.seed * 1000 + number)
        train_stage(model, sequences, stage, 20, device, lambda text: print(text, flush=True))
        torch.save(model.state_dict(), saved.with_suffix(".tmp"))
        saved.with_suffix(".tmp").rename(saved)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    print(f"saved to {arguments.output}")


if __name__ == "__main__":
    main()
