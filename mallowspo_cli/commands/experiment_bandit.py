"""`mallowspo experiment bandit`: collapse and trade-off where all is known exactly."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mallowspo_cli.commands.words import only_words, whole_number
from mallowspo_cli.distributed import log, set_up_logging
from mallowspo_cli.errors import RecipeError
from mallowspo_cli.experiments.bandit.headline import headline
from mallowspo_cli.experiments.bandit.many_prompts import ManyPrompts, PromptsGrid, run_many_prompts
from mallowspo_cli.experiments.bandit.many_prompts_claims import many_prompts_claims
from mallowspo_cli.experiments.bandit.methods import METHODS
from mallowspo_cli.experiments.bandit.one_prompt import Grid, OnePrompt, run_one_prompt
from mallowspo_cli.experiments.bandit.one_prompt_claims import one_prompt_claims
from mallowspo_cli.experiments.bandit.results import results
from mallowspo_cli.experiments.bandit.tables import (
    as_csv,
    claim_rows,
    many_prompts_rows,
    one_prompt_rows,
    one_prompt_summary,
)
from mallowspo_cli.experiments.mallows_model import DISTANCES, check_model
from mallowspo_cli.files import make_directory, write_json, write_text
from mallowspo_cli.recipe.nearest import nearest
from mallowspo_cli.report.bandit import as_markdown, print_results
from mallowspo_cli.report.bandit_pictures import draw_bandit

NAMES = (
    *("arms", "distances", "dispersions", "pairs", "betas", "objectives", "wrong_phi", "seeds"),
    *("seed", "prompts", "features", "prompt_pairs", "conflicts", "to"),
)
MOST_ARMS = 20
LEAST_BETA, MOST_BETA = 1e-4, 1e3
LEAST_PHI, MOST_PHI = 1e-12, 0.9999
"""Beyond these float64 gives out."""
DEFAULT_PLACE = "reports/bandit"


def run(words: list[str]) -> None:
    """Both bandits; see `mallowspo experiment bandit --help`."""
    set_up_logging()
    grid, prompts, place = bandit_words(words)
    make_directory(place, "the report")
    # Many small problems: a second thread costs more than it gives.
    torch.set_num_threads(1)
    one, many = _solved(grid, prompts)
    claims = one_prompt_claims(one)
    if many is not None:
        claims |= many_prompts_claims(many)
        write_text(place / "prompts.csv", as_csv(many_prompts_rows(many, one)))
    write_text(place / "rows.csv", as_csv(one_prompt_rows(one)))
    write_text(place / "summary.csv", as_csv(one_prompt_summary(one)))
    write_text(place / "claims.csv", as_csv(claim_rows(claims)))
    main = headline(one, many)
    found = results(one, many, claims, main)
    write_json(place / "results.json", found)
    pictures = draw_bandit(found, place)
    write_text(place / "report.md", as_markdown(found, claims, main, pictures))
    print_results(main, place)


def bandit_words(words: list[str]) -> tuple[Grid, PromptsGrid | None, Path]:
    """KEY=VALUE words, checked: both grids (None without prompts) and where the report goes.

    Raises:
        RecipeError: an unknown word or name, a number out of range, or settings that do not go
            together.
    """
    own, _ = only_words(words, NAMES)
    defaults = Grid()
    grid = Grid(
        arms=_arms(own, defaults.arms),
        distances=_names(own, "distances", DISTANCES),
        dispersions=_numbers(own, "dispersions", defaults.dispersions, _phi),
        pairs=_counts(own, "pairs", defaults.pairs),
        betas=_numbers(own, "betas", defaults.betas, _beta),
        objectives=_names(own, "objectives", METHODS),
        wrong_phi=_wrong_phi(own, defaults.wrong_phi),
        seeds=whole_number(own, "seeds", defaults.seeds, 2),
        seed=whole_number(own, "seed", defaults.seed, 0),
    )
    for distance in grid.distances:
        check_model(distance, grid.arms)
    return grid, _prompts(own, grid), Path(own.get("to", DEFAULT_PLACE)).expanduser()


def _solved(grid: Grid, prompts: PromptsGrid | None) -> tuple[OnePrompt, ManyPrompts | None]:
    """Both bandits; None without prompts. Raises RecipeError where float64 does not solve them."""
    try:
        one = run_one_prompt(grid)
        solved = int(one.outcomes["kl"].size - np.isnan(one.outcomes["kl"]).sum())
        log.info("one prompt: %d policies", solved)
        return one, None if prompts is None else run_many_prompts(grid, prompts)
    except ArithmeticError as error:
        raise RecipeError(
            f"{error}: take betas nearer to 1, or dispersions and wrong_phi nearer to 0.6."
        ) from error


def _prompts(own: Mapping[str, str], grid: Grid) -> PromptsGrid | None:
    defaults = PromptsGrid()
    asked = {key: own[key] for key in ("features", "prompt_pairs", "conflicts") if key in own}
    if own.get("prompts") == "0":
        if asked:
            raise RecipeError(
                f"{next(iter(asked))}= is of the prompts, and prompts=0 leaves them out."
            )
        return None
    if len(grid.dispersions) < 2:
        raise RecipeError(
            "found one dispersion, and the prompts are of the lowest and the highest: give two, or "
            "prompts=0 for one prompt alone."
        )
    count = whole_number(dict(own), "prompts", defaults.prompts, 2)
    if count % 2:
        raise RecipeError(f"prompts={count} is odd, and half of them are agreed, half disputed.")
    return PromptsGrid(
        prompts=count,
        features=whole_number(dict(own), "features", defaults.features),
        prompt_pairs=_counts(own, "prompt_pairs", defaults.prompt_pairs),
        conflicts=_numbers(own, "conflicts", defaults.conflicts, _at_least_0),
    )


def _arms(own: Mapping[str, str], default: int) -> int:
    arms = whole_number(dict(own), "arms", default, 2)
    if arms > MOST_ARMS:
        raise RecipeError(f"arms={arms} is more than {MOST_ARMS}.")
    return arms


def _wrong_phi(own: Mapping[str, str], default: tuple[float, ...]) -> tuple[float, ...]:
    if own.get("wrong_phi") == "none":
        return ()
    return _numbers(own, "wrong_phi", default, _phi)


def _names(own: Mapping[str, str], key: str, known: Sequence[str]) -> tuple[str, ...]:
    if own.get(key, "all") == "all":
        return tuple(known)
    names = own[key].split(",")
    for name in names:
        if name not in known:
            raise RecipeError(
                f"{key}={own[key]}: there is no '{name}'.{nearest(name, known)} Choices: all, or "
                f"some of {','.join(known)}."
            )
    return tuple(dict.fromkeys(names))


def _counts(own: Mapping[str, str], key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    if key not in own:
        return default
    texts = own[key].split(",")
    for text in texts:
        if not text.isdecimal() or int(text) < 1:
            raise RecipeError(f"{key}={own[key]}: '{text}' is not a whole number of at least 1.")
    return tuple(sorted(set(map(int, texts))))


def _numbers(
    own: Mapping[str, str],
    key: str,
    default: tuple[float, ...],
    allowed: Callable[[float], str],
) -> tuple[float, ...]:
    """Numbers of which `allowed` says nothing, in order; else it says what they have to be."""
    if key not in own:
        return default
    found = set()
    for text in own[key].split(","):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if wanted := allowed(value):
            raise RecipeError(f"{key}={own[key]}: '{text}' is not a number {wanted}.")
        found.add(value)
    return tuple(sorted(found))


def _phi(value: float) -> str:
    return "" if LEAST_PHI <= value <= MOST_PHI else f"from {LEAST_PHI:g} to {MOST_PHI:g}"


def _beta(value: float) -> str:
    good = LEAST_BETA <= value <= MOST_BETA
    return "" if good else f"from {LEAST_BETA:g} to {MOST_BETA:g}"


def _at_least_0(value: float) -> str:
    return "" if 0 <= value < math.inf else "of at least 0"
