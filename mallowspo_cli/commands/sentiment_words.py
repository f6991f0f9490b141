"""The words of `mallowspo experiment sentiment`, checked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mallowspo_cli.commands.sentiment_lab import Sizes
from mallowspo_cli.commands.words import own_words, whole_number
from mallowspo_cli.errors import RecipeError
from mallowspo_cli.experiments.sentiment_methods import Job, Method, all_jobs, chosen_methods
from mallowspo_cli.recipe.load import LoadedRecipe, load_recipe

OWN = (
    *("recipe", "methods", "factors", "seeds", "scale", "prompts", "samples", "eval_prompts"),
    *("max_tokens", "prompt_words", "points", "batch_size"),
    *("classifier", "positive", "reviews", "to"),
)
RECIPE, FACTORS = "sentiment_smollm2", "0.3,3"


@dataclass(frozen=True)
class Plan:
    """The words, checked."""

    recipe: str
    words: list[str]
    """Of the recipe."""
    base: LoadedRecipe
    methods: list[Method]
    factors: list[float]
    seeds: int
    sizes: Sizes
    prompt_words: int
    own: Mapping[str, str]
    to: Path

    def jobs(self) -> list[Job]:
        """Every run."""
        return all_jobs(self.methods, self.factors, range(self.seeds))

    def loaded(self, job: Job) -> LoadedRecipe:
        """What a run trains with."""
        return load_recipe(self.recipe, [*self.words, *job.words()])


def read_plan(words: Sequence[str]) -> Plan:
    """The words of the command, and every method's recipe, checked before anything is fetched.

    Raises:
        RecipeError: words that cannot be used.
    """
    own, others = own_words(words, OWN)
    for word in others:
        name = word.lstrip("+~").partition("=")[0]
        if name.startswith(("objective", "dataset", "dispersion.mode")) or name == "seed":
            raise RecipeError(f"{word!r}: the experiment sets {name} itself (methods=, factors=).")
    scale = _numbers(own, "scale", "1")
    if len(scale) != 1:
        raise RecipeError(f"scale={own['scale']} is not one number.")
    sizes = Sizes(
        prompts=max(2, round(whole_number(own, "prompts", 32, 2) * scale[0])),
        samples=whole_number(own, "samples", 4, 2),
        eval_prompts=max(2, round(whole_number(own, "eval_prompts", 64, 2) * scale[0])),
        max_tokens=whole_number(own, "max_tokens", 16),
        batch_size=whole_number(own, "batch_size", 64),
        points=whole_number(own, "points", 2),
    )
    recipe = own.get("recipe", RECIPE)
    plan = Plan(
        recipe=recipe,
        words=others,
        base=load_recipe(recipe, others),
        methods=chosen_methods(own.get("methods", "all")),
        factors=_numbers(own, "factors", FACTORS),
        seeds=whole_number(own, "seeds", 3),
        sizes=sizes,
        prompt_words=whole_number(own, "prompt_words", 5),
        own=own,
        to=Path(own.get("to", "reports/sentiment")).expanduser(),
    )
    if len({job.name for job in plan.jobs()}) < len(plan.jobs()):
        raise RecipeError(f"factors={own['factors']}: two of them give the same beta, to 6 digits.")
    # What a method cannot take, no seed or factor can.
    for job in all_jobs(plan.methods, plan.factors[:1], [0]):
        plan.loaded(job)
    return plan


def _numbers(own: Mapping[str, str], name: str, default: str) -> list[float]:
    """Numbers above 0, each once, in the order given."""
    found = []
    for text in own.get(name, default).split(","):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise RecipeError(f"{name}={own[name]}: {text!r} is not a number above 0.")
        found.append(value)
    return list(dict.fromkeys(found))
