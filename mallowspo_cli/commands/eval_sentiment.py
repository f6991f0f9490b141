"""`mallowspo eval sentiment`: reward and divergence on continuations of film reviews."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers.utils.logging

from mallowspo_cli.commands.prepare import default_device, one_process
from mallowspo_cli.commands.prompt_sources import chosen_dataset, file_tasks, held_out_prompts
from mallowspo_cli.commands.sentiment_stage import measure
from mallowspo_cli.commands.subject import Evaluated, find_model
from mallowspo_cli.commands.words import only_words, typed, whole_number
from mallowspo_cli.distributed import console, log, set_up_logging
from mallowspo_cli.errors import EvalError, RecipeError
from mallowspo_cli.evaluation.controlled.classifiers import (
    Classifier,
    TransformersClassifier,
    tfidf_classifier,
)
from mallowspo_cli.evaluation.controlled.reviews import (
    Reviews,
    beginnings,
    load_reviews,
    split_reviews,
)
from mallowspo_cli.evaluation.controlled.sentiment import sample_rows, summarise
from mallowspo_cli.evaluation.sampling.tasks import GenerateOptions, Task
from mallowspo_cli.files import make_directory
from mallowspo_cli.models.sources import resolve_model
from mallowspo_cli.recipe.choices import Quantization
from mallowspo_cli.recipe.schema import ModelConfig
from mallowspo_cli.report.sentiment import print_sentiment, write_sentiment

OWN = (
    *("model", "reference", "reference_reward", "dataset", "prompts", "prompt_words"),
    *("classifier", "positive", "reviews", "eval.limit", "output_dir"),
)
DEFAULTS = {
    "generate.engine": "transformers",
    "generate.temperature": "1",
    "generate.top_p": "1",
    "generate.max_tokens": "48",
    "generate.samples": "2",
    "generate.dtype": "float32",
}
PROMPTS, PROMPT_WORDS = 64, 5
DRAW_SEED = 0
"""Of the draw of beginnings: not the sampling's seed, so that all models go on from the same."""


@dataclass(frozen=True)
class Plan:
    """The words, checked."""

    own: dict[str, str]
    data_words: list[str]
    options: GenerateOptions
    subject: Evaluated
    reference: ModelConfig | None
    reference_reward: bool
    no_kl: str | None
    """Why there is no KL; None where there is one."""


def run(words: list[str]) -> None:
    """Evaluate controlled sentiment; see `mallowspo eval sentiment --help`."""
    set_up_logging()
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    one_process("eval sentiment")
    plan = read_plan(words)
    place = plan.subject.directory("sentiment")
    if "output_dir" in plan.own:
        place = Path(plan.own["output_dir"]).expanduser()
    make_directory(place, "the evaluation")
    start = time.monotonic()
    reviews = _reviews(plan.own)
    source, tasks = _tasks(plan, reviews)
    classifier = chosen_classifier(plan.own, reviews)
    found = measure(
        plan.subject.model,
        plan.reference,
        tasks,
        plan.options,
        kl=plan.no_kl is None,
        reference_samples=plan.reference_reward,
    )
    own = classifier.log_odds([sample.text for sample in found.samples])
    theirs = None
    if found.reference_samples is not None:
        theirs = classifier.log_odds([sample.text for sample in found.reference_samples])
    results = {
        "model": str(plan.subject.run or plan.subject.name),
        "reference": plan.reference.source if plan.reference is not None else None,
        "classifier": classifier.about,
        "prompts": {"from": source, "count": len(tasks)},
        "sampling": asdict(plan.options),
        **summarise(found, own, theirs),
        "kl_left_out": plan.no_kl,
        "seconds": time.monotonic() - start,
    }
    write_sentiment(place, results, sample_rows(found, own, theirs))
    print_sentiment(results, place)


def read_plan(words: list[str]) -> Plan:
    """The words of the command, checked before anything is fetched.

    Raises:
        RecipeError, EvalError: words that cannot be used.
    """
    own, others = only_words(words, OWN, {"generate": GenerateOptions}, ("model.", "dataset."))
    if "model" not in own:
        raise EvalError("found no model=. Example: mallowspo eval sentiment model=runs/imdb_dpo")
    options = typed(GenerateOptions, "generate", DEFAULTS | own)
    if options.engine != "transformers":
        raise RecipeError("generate.engine: this evaluation samples with transformers alone.")
    if options.dtype == "auto":
        raise RecipeError("generate.dtype=auto: name float32 or bfloat16; the KL depends on it.")
    for name in ("dataset", "prompts"):
        if name in own and "prompt_words" in own:
            raise RecipeError(f"prompt_words= cuts reviews; it says nothing of {name}=.")
    if "dataset" in own and "prompts" in own:
        raise RecipeError("found dataset= and prompts=; expected one source of prompts.")
    data_words = [word for word in others if word.startswith("dataset.")]
    if data_words and "dataset" not in own:
        raise RecipeError(f"found {data_words[0]} without dataset=NAME.")
    subject = find_model(own["model"], [word for word in others if word not in data_words])
    reference = subject.reference(own.get("reference"))
    wants = own.get("reference_reward", "false").lower()
    if wants not in ("true", "false"):
        raise RecipeError(f"reference_reward={wants} is neither true nor false.")
    if wants == "true" and reference is None:
        raise EvalError(f"reference_reward=true needs reference=MODEL: {subject.name} is no run.")
    no_kl = _no_kl(reference, options)
    return Plan(own, data_words, options, subject, reference, wants == "true", no_kl)


def _no_kl(reference: ModelConfig | None, options: GenerateOptions) -> str | None:
    if reference is None:
        return "no reference: give reference=MODEL, what the model was trained from"
    if (options.temperature, options.top_p, options.top_k) != (1, 1, 0):
        return (
            "samples are not the policy's own: it takes generate.temperature=1 generate.top_p=1 "
            "generate.top_k=0"
        )
    if reference.quantization is not Quantization.none:
        return "the reference was quantised in training, the merged model is not"
    return None


def _reviews(own: dict[str, str]) -> Reviews | None:
    """Labelled reviews, where something asks for them."""
    prompts_need = "dataset" not in own and own.get("prompts", "reviews") == "reviews"
    if not prompts_need and own.get("classifier", "tfidf") != "tfidf":
        return None
    return load_reviews(Path(own["reviews"]).expanduser() if "reviews" in own else None)


def _tasks(plan: Plan, reviews: Reviews | None) -> tuple[str, list[Task]]:
    """Where the beginnings are from, and what they are."""
    own = plan.own
    limit = whole_number(own, "eval.limit", PROMPTS)
    if "dataset" in own:
        config = chosen_dataset([f"dataset={own['dataset']}", *plan.data_words])
        tasks = [task for task, _ in held_out_prompts(config, limit)]
        return f"the held-out prompts of {config.title}", tasks
    if own.get("prompts", "reviews") != "reviews":
        return own["prompts"], file_tasks(Path(own["prompts"]).expanduser(), limit)
    assert reviews is not None
    words = whole_number(own, "prompt_words", PROMPT_WORDS)
    texts = [reviews.texts[index] for index in split_reviews(reviews)[1]]
    found = beginnings(texts, words, limit, DRAW_SEED)
    if not found:
        raise EvalError(f"no held-out review of {reviews.name} has more than {words} words.")
    if len(found) < limit:
        log.info("%d beginnings, fewer than eval.limit=%d", len(found), limit)
    return f"the first {words} words of held-out reviews of {reviews.name}", [
        Task.of(text) for text in found
    ]


def chosen_classifier(own: Mapping[str, str], reviews: Reviews | None) -> Classifier:
    """What `classifier=` names, or the TF-IDF classifier of the reviews."""
    name = own.get("classifier", "tfidf")
    if name == "tfidf":
        if "positive" in own:
            raise RecipeError("positive= names a label of another classifier than tfidf.")
        assert reviews is not None
        return tfidf_classifier(reviews)
    return TransformersClassifier.load(
        resolve_model(name), name, default_device(), own.get("positive")
    )
