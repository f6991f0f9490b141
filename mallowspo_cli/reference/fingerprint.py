"""What makes two reference passes give the same numbers."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import transformers

from mallowspo_cli.errors import ModelError
from mallowspo_cli.files import content_digest
from mallowspo_cli.models.attention import resolve_attention
from mallowspo_cli.recipe.choices import Dtype, Precision, Quantization
from mallowspo_cli.recipe.schema import ModelConfig

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")


@dataclass(frozen=True)
class Fingerprint:
    """The reference model and how it is run. Loss, beta, learning rate, seed, batch and order are
    not in it, nor is the data: rows are keyed by their tokens, which change with template, header
    and truncation. The device is not in it either: a store filled on a GPU serves a laptop.
    """

    weights: str
    """Digest of the model's safetensors files."""
    adapter: str
    """Digest of the adapter's files in the model's directory, or `none`."""
    config: str
    """Digest of config.json."""
    tokenizer: str
    """Digest of the tokenizer's vocabulary; templates are not part of it."""
    compute: str
    """Storage and compute type, such as `float32`, `bfloat16 autocast over float32`, or
    `nf4 weights, bfloat16` of a quantised model."""
    attention: str
    torch: str
    transformers: str

    def key(self) -> str:
        """A short name for a directory."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def differences(self, other: "Fingerprint") -> list[str]:
        """Fields that differ, as `field: mine, now other's`."""
        return [
            f"{f.name}: {getattr(self, f.name)}, now {getattr(other, f.name)}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]


def fingerprint(directory: Path, config: ModelConfig, precision: Precision) -> Fingerprint:
    """The fingerprint of the model in `directory`, run as the recipe says."""
    tensors = sorted(directory.glob("*.safetensors"))
    adapter = [path for path in tensors if path.name.startswith("adapter_")]
    weights = [path for path in tensors if path not in adapter]
    if not weights:
        raise ModelError(f"{directory} holds no safetensors weights.")
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} holds no config.json.")
    if adapter:
        adapter.append(directory / "adapter_config.json")
    vocabulary = [directory / name for name in VOCABULARY_FILES]
    return Fingerprint(
        weights=files_digest(weights),
        adapter=files_digest(adapter) if adapter else "none",
        config=files_digest([directory / "config.json"]),
        tokenizer=files_digest([path for path in vocabulary if path.is_file()]),
        compute=compute_name(config.dtype, precision, config.quantization),
        attention=resolve_attention(directory, config.attention),
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
    )


def compute_name(
    dtype: Dtype, precision: Precision, quantization: Quantization = Quantization.none
) -> str:
    """How a model stored as `dtype`, its matrices quantised, computes under `precision`."""
    mixed = dtype is Dtype.float32 and precision is Precision.bf16
    name = "bfloat16 autocast over float32" if mixed else dtype.value
    return name if quantization is Quantization.none else f"{quantization.value} weights, {name}"


def weights_digest(directory: Path) -> str:
    """Digest of a model directory's safetensors files and its configuration."""
    return files_digest([*sorted(directory.glob("*.safetensors")), directory / "config.json"])


def files_digest(files: list[Path]) -> str:
    """Digest of the files' names and contents."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        # A hub blob is named by its sha256, so a file of many gigabytes need not be read.
        blob = path.resolve().name
        content = blob if re.fullmatch(r"[0-9a-f]{64}", blob) else content_digest(path)
        digest.update(f"{path.name}\0{content}\n".encode())
    return digest.hexdigest()
