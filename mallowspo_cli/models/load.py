"""Load a causal language model and its tokenizer from a local directory."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from mallowspo_cli.errors import ModelError, first_line
from mallowspo_cli.models.attention import AUTO, resolve_attention
from mallowspo_cli.models.checkpointing import checkpoint_blocks
from mallowspo_cli.models.fusion import compile_blocks, use_liger
from mallowspo_cli.models.sources import resolve_model
from mallowspo_cli.recipe.choices import Dtype, Quantization
from mallowspo_cli.recipe.schema import LoraConfig, ModelConfig, TrainConfig

TEMPLATES = Path(__file__).parent / "templates"
"""Chat templates for models that have none."""
TORCH_DTYPES = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}


def model_directory(config: ModelConfig) -> Path:
    """The local directory of a recipe's model."""
    return resolve_model(config.source, config.revision, config.sha256)


def load_tokenizer(directory: Path, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, with the chat template of `model.chat_template`.

    Raises:
        ModelError: there is none, it has no offsets, or no such template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{directory} holds no tokenizer that loads: {first_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(f"{directory}: a fast tokenizer is needed (one with offsets).")
    # Limits are the recipe's; what the files say of them is not to change a digest either.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if chat_template is not None:
        tokenizer.chat_template = _template(chat_template, tokenizer)
    return tokenizer


def _template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A shipped template, with BOS where this tokenizer puts one, or a file's content as it is."""
    shipped = {path.stem: path for path in TEMPLATES.glob("*.jinja")}
    if name in shipped:
        begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        return ("{{ bos_token }}" if begins else "") + shipped[name].read_text(encoding="utf-8")
    file = Path(name).expanduser()
    if not file.is_file():
        raise ModelError(
            f"model.chat_template={name} is neither a file nor one of {', '.join(sorted(shipped))}."
        )
    return file.read_text(encoding="utf-8")


def load_model(
    directory: Path,
    dtype: torch.dtype,
    attention: str = AUTO,
    quantization: Quantization = Quantization.none,
    device: torch.device | None = None,
) -> nn.Module:
    """A causal language model with dropout off, from safetensors only.

    Args:
        dtype: type of the weights; of those that are not quantised, where some are.
        device: where a quantised model lies (None: the current CUDA device). Any other is on the
            CPU.

    Raises:
        ModelError: missing or broken files, or an attention, a package or a device that is not
            there.
    """
    quantized = quantization_options(quantization, device)
    try:
        config = AutoConfig.from_pretrained(directory)
        # Dropout would make a policy differ from its reference before the first step.
        for key in vars(config):
            if ("dropout" in key or "pdrop" in key) and isinstance(getattr(config, key), float):
                setattr(config, key, 0.0)
        model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            directory,
            config=config,
            dtype=dtype,
            attn_implementation=resolve_attention(directory, attention),
            use_safetensors=True,
            output_loading_info=True,
            **quantized,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot load the model in {directory}: {first_line(error)}") from error
    except SafetensorError as error:
        raise ModelError(f"the weights in {directory} are damaged: {first_line(error)}") from error
    # transformers would go on with random weights.
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"the weights in {directory} lack {len(missing)} tensors of {type(model).__name__}: "
            f"{', '.join(missing[:3])}{', ...' if missing[3:] else ''}."
        )
    return model


def quantization_options(quantization: Quantization, device: torch.device | None) -> dict[str, Any]:
    """What `from_pretrained` takes to quantise weights as it reads them; nothing for `none`.

    Raises:
        ModelError: bitsandbytes or a CUDA device is missing.
    """
    if quantization is Quantization.none:
        return {}
    package = importlib.util.find_spec("bitsandbytes") is not None
    if not package or not torch.cuda.is_available():
        found = {"bitsandbytes": package, "a CUDA device": torch.cuda.is_available()}
        missing = " and ".join(name for name, there in found.items() if not there)
        raise ModelError(
            f"model.quantization={quantization.value} needs bitsandbytes (pip install "
            f"'mallowspo[quantized]') and a CUDA device; missing: {missing}. Mend that, or set "
            "model.quantization=none."
        )
    if quantization is Quantization.int8:
        options = BitsAndBytesConfig(load_in_8bit=True)
    else:
        options = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.value,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            # ZeRO-3 and FSDP shard tensors of a floating type only.
            bnb_4bit_quant_storage=torch.bfloat16,
        )
    # ZeRO-3 takes no map of devices, not even of one.
    place = {} if device is None else {"device_map": {"": device}}
    return {"quantization_config": options, **place}


def load_policy(
    config: ModelConfig,
    directory: Path,
    train: TrainConfig,
    seed: int,
    device: torch.device | None = None,
) -> nn.Module:
    """The model to train: float32 master weights, or adapters where the recipe asks for them.

    The frozen base of adapters is loaded as the reference pass loads it, quantised or not, so that
    the policy begins as its reference; peft makes the adapters float32. peft's
    `prepare_model_for_kbit_training` is left out: the base is frozen by the adapters already,
    blocks are not checkpointed reentrantly (their inputs need no gradient), and norms in another
    type than the reference's would be another model.

    Args:
        device: where a quantised base lies (None: the current CUDA device).
    """
    dtype = TORCH_DTYPES[config.dtype] if config.lora.rank else torch.float32
    model = load_model(directory, dtype, config.attention, config.quantization, device)
    if config.lora.rank:
        model = add_lora(model, config.lora, seed)
    if train.liger:
        use_liger(model)
    checkpoint_blocks(model, train.activation_checkpointing)
    if train.compile:
        compile_blocks(model)
    return model.train()


def add_lora(model: nn.Module, config: LoraConfig, seed: int) -> nn.Module:
    """Wrap the model with low-rank adapters, whose initial weights depend on the seed alone."""
    try:
        import peft
    except ImportError as error:
        raise ModelError("model.lora needs peft: pip install 'mallowspo[lora]'") from error
    modules = config.target_modules
    names = [name.strip() for name in modules.split(",")]
    _check_targets(model, names)
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=modules if names == ["all-linear"] else names,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, options)
        except ValueError as error:
            raise ModelError(f"model.lora.target_modules={modules}: {first_line(error)}") from error


def _check_targets(model: nn.Module, names: list[str]) -> None:
    """peft takes a list of which one name matches, and leaves the others out without a word."""
    paths = [f".{path}" for path, _ in model.named_modules()]
    unknown = [n for n in names if not n or not any(path.endswith(f".{n}") for path in paths)]
    if unknown and names != ["all-linear"]:
        linear = {p.split(".")[-1] for p, m in model.named_modules() if isinstance(m, nn.Linear)}
        raise ModelError(
            f"model.lora.target_modules: the model has no module '{unknown[0]}'. "
            f"Its linear layers: {', '.join(sorted(linear))}; all-linear takes all but the head."
        )
