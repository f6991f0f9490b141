"""What is to be answered, and how answers are sampled."""

from dataclasses import dataclass

from mallowspo_cli.data.pairs import Message
from mallowspo_cli.errors import RecipeError


@dataclass(frozen=True)
class GenerateOptions:
    """How answers are sampled; the defaults are those of the published Llama-3-8B runs."""

    engine: str = "auto"
    """transformers, vllm, or auto: vllm where it is installed and there is a GPU."""
    temperature: float = 0.7
    """0 takes the most probable token."""
    top_p: float = 0.9
    """Sample among the most probable tokens that together have this probability; 1: among all."""
    top_k: int = 0
    """Sample among so many most probable tokens; 0: among all."""
    max_tokens: int = 4096
    """Longest answer; shorter where the model's context ends before."""
    batch_size: int = 16
    """Answers at a time with transformers. Lower it when memory runs out."""
    samples: int = 1
    """Answers to each instruction; the judge sees the first."""
    dtype: str = "auto"
    """Of the weights: float32, bfloat16, or auto: bfloat16 where the device computes in it."""
    seed: int = 0
    """Of the sampling."""

    def __post_init__(self) -> None:
        checks = {
            "engine": self.engine in ("auto", "transformers", "vllm"),
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "max_tokens": self.max_tokens >= 1,
            "batch_size": self.batch_size >= 1,
            "samples": self.samples >= 1,
            "dtype": self.dtype in ("auto", "float32", "bfloat16"),
            "seed": self.seed >= 0,
        }
        for name, good in checks.items():
            if not good:
                raise RecipeError(
                    f"generate.{name}={getattr(self, name)} is out of range. See `--help`."
                )
        if self.samples > 1 and self.temperature == 0:
            raise RecipeError(
                "generate.samples above 1 with generate.temperature=0 would repeat one answer. "
                "Raise the temperature, or take one sample."
            )


@dataclass(frozen=True)
class Task:
    """What is to be answered."""

    instruction: str
    """As the judge reads it; no other task has the same."""
    messages: tuple[Message, ...]
    """As the chat template renders it."""
    dataset: str = ""

    @classmethod
    def of(cls, instruction: str, dataset: str = "") -> "Task":
        """An instruction as the one turn of a user."""
        return cls(instruction, (Message("user", instruction),), dataset)
