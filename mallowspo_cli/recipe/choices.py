"""The choices that recipe keys have."""

from enum import StrEnum


class Dtype(StrEnum):
    """Storage type of the frozen reference model's weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Quantization(StrEnum):
    """How the frozen base under adapters is stored."""

    none = "none"
    nf4 = "nf4"
    int8 = "int8"


class Precision(StrEnum):
    """Compute type of the forward and backward pass; master weights are always float32."""

    fp32 = "fp32"
    bf16 = "bf16"
    auto = "auto"


class Truncation(StrEnum):
    """What happens to a pair that is too long."""

    drop = "drop"
    keep_start = "keep_start"
    keep_end = "keep_end"


class OnError(StrEnum):
    """What happens at a row that is no preference pair."""

    stop = "stop"
    drop = "drop"


class Pairing(StrEnum):
    """Which pairs are made of scored responses to one prompt."""

    best_worst = "best_worst"
    all = "all"


class DispersionSource(StrEnum):
    """Where a prompt's dispersion comes from."""

    entropy = "entropy"
    column = "column"
    raters = "raters"


class DispersionMode(StrEnum):
    """The dispersion as it is, or a control in its place."""

    estimated = "estimated"
    constant = "constant"
    shuffled = "shuffled"
    inverse = "inverse"


class ColumnKind(StrEnum):
    """What the numbers of `dispersion.column` are."""

    weight = "weight"
    neg_log_phi = "neg_log_phi"


class Pooling(StrEnum):
    """How the two responses' entropies become one."""

    sequences = "sequences"
    tokens = "tokens"


class Span(StrEnum):
    """Which tokens of a response count."""

    response = "response"
    skip_first = "skip_first"


class ActivationCheckpointing(StrEnum):
    """Which activations are recomputed in the backward pass."""

    none = "none"
    selective = "selective"
    full = "full"


class Optimizer(StrEnum):
    """The optimizer of the policy's float32 master weights."""

    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    rmsprop = "rmsprop"


class Scheduler(StrEnum):
    """Shape of the learning rate after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Order(StrEnum):
    """Order of the training pairs within an epoch."""

    shuffle = "shuffle"
    sequential = "sequential"
    easy_first = "easy_first"
    hard_first = "hard_first"
    stratified = "stratified"

    @property
    def by_dispersion(self) -> bool:
        """Whether it needs every training pair's dispersion."""
        return self in (Order.easy_first, Order.hard_first, Order.stratified)
