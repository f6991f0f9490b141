"""`mallowspo export`: a run's model as a directory that transformers and vLLM load."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging
from safetensors import SafetensorError
from torch import Tensor

from mallowspo_cli import __version__
from mallowspo_cli.commands.prepare import one_process
from mallowspo_cli.commands.run_source import (
    Source,
    find_source,
    read_json,
    results_so_far,
    run_recipe,
)
from mallowspo_cli.commands.words import own_words
from mallowspo_cli.distributed import console, log, set_up_logging
from mallowspo_cli.errors import MallowsPOError, RecipeError, first_line
from mallowspo_cli.files import make_directory, whole_directory, write_json, write_text
from mallowspo_cli.models.load import load_model, load_tokenizer, model_directory
from mallowspo_cli.models.trained import EAGER, adapter_weights, merge_adapters, trained_model
from mallowspo_cli.recipe.choices import Quantization
from mallowspo_cli.recipe.load import LoadedRecipe
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.report.model_card import hub_id, model_card
from mallowspo_cli.training.checkpoint import checkpoint_weights

OWN_WORDS = ("run", "checkpoint", "output")
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
RECORD = "export.json"
"""Says what an export is of; a directory without it is not replaced."""
SHARD_SIZE = "5GB"
OLDER_ROPE = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
}
"""What rotations' parameters were called before transformers 5, by their names now."""


def run(words: Sequence[str], merge: bool, dtype: str, overwrite: bool) -> None:
    """Write a run's model to a directory; see `mallowspo export --help`."""
    set_up_logging()
    own, others = own_words(words, OWN_WORDS)
    if others or "run" not in own:
        found = f"found {others[0]!r}" if others else "found no run="
        raise RecipeError(
            f"{found}, expected run=DIR and maybe checkpoint= and output=. "
            "Example: mallowspo export run=runs/quickstart"
        )
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}.")
    one_process("export")
    directory = Path(own["run"]).expanduser()
    loaded = run_recipe(directory)
    if not merge and loaded.recipe.model.lora.rank == 0:
        raise RecipeError(
            f"the run in {directory} trained no adapters (model.lora.rank=0), so there are none to "
            "write apart. Leave --adapter-only out."
        )
    source = find_source(directory, own.get("checkpoint"))
    output = Path(own.get("output", directory / "export")).expanduser()
    _check_output(output, overwrite)
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    log.info("exporting %s of %s in %s", source, directory, dtype)
    _write(output, loaded, source, merge, DTYPES[dtype])
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    log.info("wrote %s: %.3g GB of weights", output, size / 1e9)


def _check_output(output: Path, overwrite: bool) -> None:
    if not os.path.lexists(output):
        make_directory(output.parent, "the export")
        return
    if not (output / RECORD).is_file():
        raise MallowsPOError(
            f"{output} is there already and is no export of this command. Give another place: "
            "output=DIR."
        )
    if not overwrite:
        raise MallowsPOError(
            f"{output} holds an export already. Replace it (--overwrite), or give another place: "
            "output=DIR."
        )


def _write(
    output: Path, loaded: LoadedRecipe, source: Source, merge: bool, dtype: torch.dtype
) -> None:
    """Fill the directory, whole or not at all, in the place of an earlier export."""
    recipe = loaded.recipe
    model = _model(recipe, source, merge, dtype)
    tokenizer = _tokenizer(recipe, source)
    about = _about(recipe, source, merge, dtype)
    card = _card(loaded, source, merge, about)
    place = output.resolve()
    try:
        with whole_directory(place) as target:
            options = {"max_shard_size": SHARD_SIZE} if merge else {"save_embedding_layers": False}
            model.save_pretrained(target, **options)
            tokenizer.save_pretrained(target)
            _add_older_names(target)
            write_text(target / "README.md", card)
            write_json(target / RECORD, about)
            if place.exists():
                shutil.rmtree(place)
    except SafetensorError as error:
        raise MallowsPOError(f"cannot write {output}: {first_line(error)}") from error


def _model(recipe: Recipe, source: Source, merge: bool, dtype: torch.dtype) -> Any:
    """What is to be saved: at most one copy of the model, beside what a checkpoint holds of it."""
    config, final = recipe.model, source.run / "model"
    if source.checkpoint is None and merge:
        about = read_json(final / "config.json")
        # Where the base was quantised its sum with the adapters may be, too.
        if "quantization_config" not in about:
            if dtype is torch.float32 and about["dtype"] != "float32":
                log.info(
                    "%s is stored in %s, so float32 adds no precision; checkpoint=last has float32",
                    *(final, about["dtype"]),
                )
            return load_model(final, dtype, EAGER)
    if source.checkpoint is None:
        weights = adapter_weights(source.run / "adapter")
    else:
        weights = checkpoint_weights(source.checkpoint)
    directory = model_directory(config)
    if not config.lora.rank:
        return trained_model(config, directory, weights, dtype)
    if not merge:
        return _adapters(recipe, directory, weights, dtype)
    if config.quantization is not Quantization.none:
        log.info(
            "the adapters were trained on %s weights, and are merged into the base as it was: "
            "the result differs from what was trained by the quantisation error",
            config.quantization.value,
        )
    # In float32, so that base and adapters together are rounded once.
    return merge_adapters(trained_model(config, directory, weights, torch.float32), dtype)


def _adapters(
    recipe: Recipe, directory: Path, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> Any:
    """A peft model whose adapters are in `dtype`. Its base, which is not written, is small."""
    config = recipe.model
    model = trained_model(config, directory, weights, torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    about = model.peft_config["default"]
    about.base_model_name_or_path = hub_id(config.source) or str(directory)
    about.revision = config.revision
    return model


def _tokenizer(recipe: Recipe, source: Source) -> Any:
    """With the chat template that the run trained with."""
    if source.checkpoint is None:
        return load_tokenizer(source.run / "model")
    return load_tokenizer(model_directory(recipe.model), recipe.model.chat_template)


def _about(recipe: Recipe, source: Source, merge: bool, dtype: torch.dtype) -> dict[str, Any]:
    lora = recipe.model.lora.rank > 0
    return {
        "run": str(source.run),
        "step": source.step,
        "checkpoint": source.checkpoint.name if source.checkpoint else None,
        "dtype": str(dtype).removeprefix("torch."),
        "adapters": ("merged" if merge else "apart") if lora else None,
        "quantization": recipe.model.quantization.value,
        "mallowspo": __version__,
    }


def _card(loaded: LoadedRecipe, source: Source, merge: bool, about: dict[str, Any]) -> str:
    run, recipe = source.run, loaded.recipe
    final = source.checkpoint is None
    results = read_json(run / "results.json") if final else results_so_far(recipe, source)
    file = run / "dispersion.json"
    notes = [f"exported from {source}, in {about['dtype']}"]
    if about["adapters"]:
        rank, quantization = recipe.model.lora.rank, recipe.model.quantization
        notes.append(f"low-rank adapters of rank {rank}, {about['adapters']}")
        if quantization is not Quantization.none:
            notes.append(
                f"trained on a base quantised to {quantization.value}; the base here is not "
                "quantised, which is a difference of the quantisation error"
            )
    return model_card(
        loaded.to_yaml(),
        results,
        read_json(file) if file.is_file() else None,
        read_json(run / "environment.json"),
        notes,
        "transformers" if merge else "peft",
    )


def _add_older_names(target: Path) -> None:
    """Repeat what transformers 5 writes in a new way for readers that know the old one alone.

    Without `rope_theta` such a reader (a vLLM over transformers 4, say) takes 10,000, silently.
    """
    file = target / "config.json"
    if file.is_file():
        config = read_json(file)
        rope = config.get("rope_parameters") or {}
        older = {"torch_dtype": config["dtype"]}
        for now, names in OLDER_ROPE.items():
            older |= {name: rope[now] for name in names if now in rope}
        if rope.get("rope_type", "default") != "default":
            older["rope_scaling"] = {k: v for k, v in rope.items() if k not in OLDER_ROPE}
        write_json(file, older | config)
    file = target / "tokenizer_config.json"
    options = read_json(file)
    if options["tokenizer_class"] == "TokenizersBackend":
        options["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(options.get("extra_special_tokens"), list):
        options["additional_special_tokens"] = options.pop("extra_special_tokens")
    write_json(file, options)
