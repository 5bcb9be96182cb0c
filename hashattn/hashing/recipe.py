"""Training recipes: every choice of hash training by name, so that a table can vary one at a time.

`TrainRecipe.official()` is the paper's (HashAttention code, train_hashattention.py);
`TrainRecipe.default()` is this project's, `signs()` what lies between.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hashattn.base.checks import is_count, require, require_numbers

_CHOICES = {
    "loss": ("bce", "cross_entropy", "budgeted", "sampling"),
    "surrogate": ("tanh", "anneal", "straight_through"),
    "init": ("random", "spectral", "transform"),
    "normalise": ("none", "per_head"),
    "schedule": ("constant", "one_cycle"),
    "precision": ("bfloat16", "float32"),
    "weigh": ("mass", "output"),
    "group": ("each", "sum"),
}
COUNTS = {  # the least
    "top": 1, "steps": 1, "rows_per_step": 1, "sequences_per_step": 1, "evaluate_every": 1,
    "patience": 1, "selection_fraction": 1, "sink": 0, "local": 0,
}  # fmt: skip
SHARES = ("mass_share", "hard_share")
_NOT_NEGATIVE = ("balance", "decorrelation", "weight_decay", "alpha", "beta")
POSITIVE = ("learning_rate", "scale", "budget_fraction", "top_fraction")


@dataclass(frozen=True)
class TrainRecipe:
    """How one layer's hash maps are trained; fields are `signs()` unless given.

    Labels
      top: label tokens per query row and head; with top_fraction only visible * top_fraction of
      them (at least one, at most top), so that labels scale with length. weigh: what ranks and
      weighs them, "mass" (the token's attention weight a) or "output" (what the attention output o
      loses without it, a / (1 - a) |v - o| / |o|, v its value). mass_share: weight of a label that
      follows that measure (rows with more of it outside sink and local count more); the rest,
      1 - mass_share, is spread evenly over the labels of every row.
      sink, local: tokens excluded from labels and loss.
    Loss
      loss: "bce" (the paper's; positive weight alpha + beta * tokens), "cross_entropy" of the
      label weights against softmax of the scores, or "budgeted", where a label costs
      softplus(logsumexp(scores) - log(k) - its score) with k = visible / budget_fraction, so
      that a token stops costing once it is safely among the k best; or "sampling", the log of
      sum(a^2 / w), a the attention and w the softmax of the scores, by which the variance grows
      when tokens are drawn with probabilities in proportion to w (kernels.sample).
      learn_scale: train scale and bias of the logits, starting at `scale`; else fixed.
      group: what a token is ranked by where query heads share a key map: "each" query head's own
      score, for one selection per query head, or the "sum" over the group, for one per group.
      average_group: logits are the mean over the group and bits (times scale), else the plain sum.
      balance, decorrelation: weights of the key bits' squared mean and squared correlations.
    Surrogate of the sign
      "tanh"; "anneal": tanh(s * x) with s rising from 1 to `sharpness`; "straight_through":
      anneal, then hard signs with tanh's gradient for the last hard_share of the steps.
    Optimisation
      Adam(W), learning_rate (the peak for "one_cycle"), steps; each step takes
      sequences_per_step sequences, rows_per_step rows of each and, where keys_per_step is set,
      at most that many keys (labels first, then random ones).
      init: "random" (torch's Linear), "spectral" (a linear hash of the directions in which
      queries and keys interact most, exact at depths 1 to 3) or "transform" (the same directions,
      unrotated, with as many bits each as its size deserves: hashing.transform. Components and
      levels train instead of bits, and the surrogate is the identity).
      normalise: inputs by mean and standard deviation per head and channel, folded into the first
      stage when saved.
      precision: of the weights as they are validated and saved; "bfloat16" halves what every
      token's codes must read.
    Validation
      every evaluate_every steps with hard codes, selecting visible / selection_fraction tokens;
      the best maps are kept, by their divergence for the loss "sampling", else by recall and mass;
      stop after `patience` evaluations without a better one.
    Raises ValueError naming the field, its value and what is allowed.
    """

    top: int = 32
    top_fraction: float = 1.0
    weigh: str = "mass"
    mass_share: float = 0.5
    sink: int = 4
    local: int = 28
    loss: str = "budgeted"
    budget_fraction: float = 64.0
    alpha: float = 20.0
    beta: float = 0.0
    scale: float = 20.0
    group: str = "each"
    learn_scale: bool = True
    average_group: bool = True
    balance: float = 0.0
    decorrelation: float = 0.0
    surrogate: str = "anneal"
    sharpness: float = 6.0
    hard_share: float = 0.3
    init: str = "spectral"
    normalise: str = "per_head"
    schedule: str = "one_cycle"
    learning_rate: float = 5e-3
    weight_decay: float = 0.0
    steps: int = 600
    sequences_per_step: int = 1
    rows_per_step: int = 64
    keys_per_step: int | None = None
    precision: str = "bfloat16"
    evaluate_every: int = 100
    patience: int = 8
    selection_fraction: int = 32

    def __post_init__(self) -> None:
        for field, value in vars(self).items():
            if field in _CHOICES:
                require(value in _CHOICES[field], field, value, " or ".join(_CHOICES[field]))
        require_numbers(vars(self), counts=COUNTS, shares=SHARES, positive=POSITIVE,
                        not_negative=_NOT_NEGATIVE)  # fmt: skip
        keys = self.keys_per_step
        require(keys is None or is_count(keys, self.top), "keys_per_step", keys,
                f"None or an integer of at least top, {self.top}")  # fmt: skip

    @property
    def shape(self) -> dict[str, int]:
        """Depth and folds of the maps that it trains, where nobody asks for others."""
        return {"depth": 1, "folds": 3} if self.init == "transform" else {"depth": 2, "folds": 0}

    @property
    def reads_values(self) -> bool:
        """Whether training looks at values, which are captured for such recipes alone."""
        return self.weigh == "output"

    def vary(self, **changes: object) -> TrainRecipe:
        """The same recipe with some options changed (one row of an ablation table)."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def default(cls) -> TrainRecipe:
        """This project's recipe: transform codes, trained on from the calibrated ones so that their
        scores are logits to draw tokens by.

        Against the "budgeted" loss with labels and budget of an eighth of the tokens, SmolLM2 reads
        better by it whether tokens are drawn or ranked; the embedded model loses 1 to 2 % of output
        error where 1/8 or 1/16 are ranked. Few steps: codes learn the kind of text next.
        """
        return cls(
            init="transform", loss="sampling", steps=300, learning_rate=3e-3, top=128,
            average_group=False, evaluate_every=50,
        )  # fmt: skip

    @classmethod
    def signs(cls) -> TrainRecipe:
        """A bit for each direction, learned as the paper's are: what the codes before transform
        codes were trained with, and the form in which codes of queries and keys are alike."""
        return cls()

    @classmethod
    def fine_tuning(cls) -> TrainRecipe:
        """For trained weights (`start`) and a few samples of a task: fewer steps, a fifth of the
        learning rate. At the default's, 25 samples gained a quarter as much attention mass (the
        embedded model's `needle` at 4K tokens, 100 steps).
        """
        return cls(steps=60, learning_rate=1e-3, evaluate_every=30)

    @classmethod
    def official(cls) -> TrainRecipe:
        """The paper's: BCE on sigmoid(tanh . tanh), top-32 labels, alpha 20, beta 0, Adam 1e-3.

        Differences: float32 throughout (the code trains in bfloat16, where the sigmoid
        saturates) and a bounded number of steps, with the best validated maps kept.
        """
        return cls(
            top=32,
            mass_share=0.0,
            sink=128,
            local=128,
            loss="bce",
            alpha=20.0,
            beta=0.0,
            scale=1.0,
            group="sum",
            learn_scale=False,
            average_group=False,
            surrogate="tanh",
            init="random",
            normalise="none",
            schedule="constant",
            learning_rate=1e-3,
            precision="float32",
        )
