"""`mallowspo eval compare`: which of several models is better, and how sure that is."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mallowspo_cli.commands.words import only_words, whole_number
from mallowspo_cli.distributed import set_up_logging
from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.comparing.comparison import compare
from mallowspo_cli.evaluation.comparing.lengths import LengthFiles
from mallowspo_cli.evaluation.comparing.metrics import RESAMPLES_LC, Resampling
from mallowspo_cli.evaluation.comparing.paired import RESAMPLES
from mallowspo_cli.evaluation.comparing.sides import Side, read_sides, short_names
from mallowspo_cli.evaluation.outputs import read_rows
from mallowspo_cli.evaluation.win_rates.alpacaeval import DIFFICULTY_FILE, GAMED_FILE, hub_file
from mallowspo_cli.evaluation.win_rates.calibration import read_gamed
from mallowspo_cli.evaluation.win_rates.difficulty import is_official
from mallowspo_cli.files import make_directory, write_json, write_text
from mallowspo_cli.report.comparison import as_markdown, print_comparison
from mallowspo_cli.report.comparison_picture import draw_comparison

FILES = ("difficulty", "gamed", "instructions")
KEYS = ("to", "seed", "bootstrap", "bootstrap_lc", *FILES)
FEWEST_RESAMPLES = 100
LONGEST_NAME = 100
"""Characters of the report's directory, of which file systems take 255 bytes."""
EXAMPLE = "Example: mallowspo eval compare runs/dpo runs/phi"


@dataclass(frozen=True)
class Wanted:
    """The words, checked."""

    sides: list[str]
    to: Path
    resampling: Resampling
    lengths: LengthFiles | None


def run(words: list[str]) -> None:
    """Compare runs, evaluations or groups of seeds; see `mallowspo eval compare --help`."""
    set_up_logging()
    wanted = compare_words(words)
    sides, notes = read_sides(wanted.sides), _looks_like_seeds(wanted.sides)
    lengths = wanted.lengths or _official_files(sides, notes)
    results = compare(sides, wanted.resampling, lengths)
    results["notes"] += notes
    place = make_directory(wanted.to, "the report")
    draw_comparison(results, place / "comparison.png")
    write_json(place / "comparison.json", results)
    write_text(place / "report.md", as_markdown(results, "comparison.png"))
    print_comparison(results, place)


def compare_words(words: list[str]) -> Wanted:
    """Sides and KEY=VALUE words, checked.

    Raises:
        RecipeError: an unknown key, or a value that cannot be.
        EvalError: fewer than two sides, or a file that is not there.
    """
    sides: list[str] = []
    for word in words:
        key, equals, _ = word.partition("=")
        # A path may hold an equals sign.
        if not equals or (key not in KEYS and ("/" in key or Path(word).exists())):
            sides.append(word)
    given, _ = only_words([word for word in words if word not in sides], KEYS)
    if len(sides) < 2:
        raise EvalError(
            f"found {sides[0] if sides else 'nothing'} to compare, expected two or more. {EXAMPLE}"
        )
    resampling = Resampling(
        whole_number(given, "bootstrap", RESAMPLES, FEWEST_RESAMPLES),
        whole_number(given, "bootstrap_lc", RESAMPLES_LC, FEWEST_RESAMPLES),
        whole_number(given, "seed", 0, 0),
    )
    to = Path(given["to"]).expanduser() if "to" in given else _directory(sides)
    return Wanted(sides, to, resampling, _length_files(given))


def _directory(sides: list[str]) -> Path:
    names = [re.sub(r"[^A-Za-z0-9._]+", "_", name).strip("._") for name in short_names(sides)]
    return Path("reports") / f"compare-{'-'.join(names)}"[:LONGEST_NAME]


def _length_files(given: dict[str, str]) -> LengthFiles | None:
    """The files of length control, each read once so that one that is broken is told here."""
    paths = {key: Path(given[key]).expanduser() for key in FILES if key in given}
    for key, path in paths.items():
        if not path.is_file():
            raise EvalError(f"{key}={path}: there is no such file.")
    if not paths:
        return None
    if "gamed" not in paths:
        raise EvalError(
            f"{next(iter(paths))}= is of use with gamed=FILE alone: length control needs both. "
            "Without either, AlpacaEval's own instructions get its own files, and others its "
            "minimal fit."
        )
    read_gamed(paths["gamed"])
    order = None
    if "instructions" in paths:
        order = [str(row.get("instruction") or "") for row in read_rows(paths["instructions"])]
        if not all(order):
            raise EvalError(f"{paths['instructions']}: a row has no text under 'instruction'.")
    return LengthFiles(paths["gamed"], paths.get("difficulty"), order)


def _official_files(sides: Sequence[Side], notes: list[str]) -> LengthFiles | None:
    """AlpacaEval's own files where they are at hand and an evaluation is of its instructions."""
    evaluations = [e for side in sides for member in side.members for e in member.evaluations]
    if not any(is_official(list(e.annotations)) for e in evaluations):
        return None
    try:
        files = hub_file(GAMED_FILE, "gamed"), hub_file(DIFFICULTY_FILE, "difficulty")
    except EvalError as error:
        notes.append(f"Length control is the minimal one, without difficulties: {error}")
        return None
    return LengthFiles(*files, official_only=True)


def _looks_like_seeds(sides: list[str]) -> list[str]:
    """A hint where the shell has taken a pattern apart that was to stand for one side."""
    stems: dict[str, list[str]] = {}
    for side in sides:
        path = Path(side)
        if stem := re.sub(r"\d+$", "", path.name):
            stems.setdefault(str(path.parent / stem), []).append(side)
    return [
        f"{', '.join(group)} are compared with one another. If they are seeds of one "
        f"configuration, quote them as one side: '{stem}*'"
        for stem, group in stems.items()
        if len(set(group)) > 1
    ]
