"""The runs of `mallowspo experiment sentiment`: one policy in memory, set back before each."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import set_seed
from scipy.special import expit
from transformers import AutoConfig

from mallowspo_cli.commands.known import known_pairs, pair_order
from mallowspo_cli.commands.launch import make_accelerator, own_peak, read_launch
from mallowspo_cli.commands.prepare import Prepared, default_device
from mallowspo_cli.commands.sentiment_stage import PACK_TOKENS, plain_tokenizer
from mallowspo_cli.data.prepare import PreparedSplit
from mallowspo_cli.data.table import SCHEMA, TokenizedPairs, pair_id
from mallowspo_cli.distributed import log
from mallowspo_cli.errors import EvalError, TrainingError
from mallowspo_cli.evaluation.controlled.classifiers import Classifier
from mallowspo_cli.evaluation.controlled.sentiment import (
    Floats,
    Sample,
    draw_samples,
    prompt_means,
    sequence_logps,
)
from mallowspo_cli.evaluation.sampling.stage import render_prompts
from mallowspo_cli.evaluation.sampling.tasks import GenerateOptions, Task
from mallowspo_cli.evaluation.sampling.transformers_engine import TransformersEngine
from mallowspo_cli.files import make_directory, write_json
from mallowspo_cli.models.load import TORCH_DTYPES, load_model, load_policy, model_directory
from mallowspo_cli.recipe.choices import Dtype
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.scoring import PairScorer
from mallowspo_cli.training.loop import optimizer_step, total_steps
from mallowspo_cli.training.metrics import MetricsFile
from mallowspo_cli.training.optim import build_optimizer
from mallowspo_cli.training.run import Run
from mallowspo_cli.training.zero import engine_of

DIGITS = 6
"""Of the numbers of single beginnings in a row's file."""


@dataclass(frozen=True)
class Sizes:
    """How much is sampled, for each seed."""

    prompts: int
    """Beginnings that the pairs are made of."""
    samples: int
    """Continuations of each; all pairs of them whose rewards differ are trained on."""
    eval_prompts: int
    """Other beginnings, that policies are measured on, with one continuation each."""
    max_tokens: int
    batch_size: int
    points: int
    """Evenly spaced steps of a run after which it is measured, the last one included."""


class Lab:
    """What all runs share: the reference, the policy's first weights, the classifier."""

    def __init__(self, recipe: Recipe, classifier: Classifier, sizes: Sizes, to: Path):
        self.classifier, self.sizes, self.to = classifier, sizes, to
        self.device = default_device()
        self.directory = model_directory(recipe.model)
        self.tokenizer = plain_tokenizer(self.directory, recipe.model.chat_template)
        config = AutoConfig.from_pretrained(self.directory)
        self.context = getattr(config, "max_position_embeddings", None)
        launch = read_launch(recipe)
        self.accelerator = make_accelerator(launch, recipe, to, [])
        model = recipe.model
        reference = load_model(self.directory, TORCH_DTYPES[Dtype(model.dtype)], model.attention)
        self.reference = PairScorer(reference).to(self.device).eval()
        policy = load_policy(model, self.directory, recipe.train, recipe.seed, self.device)
        # Measured without what accelerate wraps round training (autocast), as the reference is.
        self.measured = PairScorer(policy)
        self.policy = self.accelerator.prepare(PairScorer(policy))
        self.first = {
            name: weight.detach().clone()
            for name, weight in self.policy.named_parameters()
            if weight.requires_grad
        }

    def measure_reference(self, seed: int, tasks: Sequence[Task]) -> dict[str, Any]:
        """The reference's own reward on a seed's beginnings to measure on."""
        return self._measure(self.reference, seed, tasks)

    def pairs(self, seed: int, tasks: Sequence[Task], made_from: str) -> TokenizedPairs:
        """A seed's training pairs: the reference's continuations, ranked by the classifier.

        Kept as token ids, so that they are what was sampled and a cut continuation has no end; and
        in a file, made anew unless it was `made_from` the same.
        """
        place = self.to / "data" / f"seed{seed}.json"
        if place.is_file() and (found := json.loads(place.read_text()))["made_from"] == made_from:
            return _table(found["groups"])
        start = time.monotonic()
        options = self._options(self.sizes.samples, seed)
        prompts = render_prompts(tasks, self.tokenizer, self.context, options)
        engine = TransformersEngine(self.reference.causal_model, self.tokenizer, options)
        samples = draw_samples(engine, prompts, self.tokenizer)
        odds = self.classifier.log_odds([sample.text for sample in samples])
        groups = _groups(samples, odds, engine.ends[0])
        make_directory(place.parent, "the experiment")
        write_json(place, {"made_from": made_from, "groups": groups})
        log.info(
            "seed %d: %d continuations of %d beginnings in %.0f s",
            *(seed, len(samples), len(tasks), time.monotonic() - start),
        )
        return _table(groups)

    def train(
        self, recipe: Recipe, pairs: TokenizedPairs, tasks: Sequence[Task]
    ) -> list[dict[str, Any]]:
        """Train from the first weights; returns what was found at each point, measured on `tasks`.

        Raises:
            TrainingError: a loss, a gradient or what was measured is not finite.
        """
        try:
            run, reference = self._run(recipe, pairs)
            return list(self._points(run, reference, tasks))
        finally:
            self.accelerator.free_memory()

    def _points(self, run: Run, reference: Any, tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
        due = {run.total_steps * (i + 1) // self.sizes.points for i in range(self.sizes.points)}
        objective, running = run.recipe.objective, {}
        for step in range(run.total_steps):
            loss = objective.at_step(running)
            values, _ = optimizer_step(run, loss, reference, step)
            running = loss.updated(values)
            if step + 1 not in due:
                continue
            found = self._measure(self.measured, run.recipe.seed, tasks)
            if not (math.isfinite(found["reward"]) and math.isfinite(found["kl"])):
                raise TrainingError(
                    f"after step {step + 1} the reward is {found['reward']:g} and the KL "
                    f"{found['kl']:g}. Lower train.learning_rate."
                )
            yield {"step": step + 1, **found, "training": _numbers(values)}
            run.scorer.train()

    def _run(self, recipe: Recipe, pairs: TokenizedPairs) -> tuple[Run, Any]:
        """A run as if no other had been before it."""
        set_seed(recipe.seed)
        # What a run that failed in the middle of a step left.
        self.policy.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, weight in self.policy.named_parameters():
                if name in self.first:
                    weight.copy_(self.first[name])
        split = PreparedSplit(pairs, len(pairs), len(pairs), {}, [""], np.zeros(len(pairs), int))
        prepared = Prepared(self.directory, self.tokenizer, {"train": split}, "the same command")
        known = known_pairs(recipe, prepared)
        optimizer = self.accelerator.prepare(build_optimizer(self.policy, recipe.train))
        self.policy.train()
        run = Run(
            recipe=recipe,
            directory=self.to,
            engine=engine_of(self.accelerator, self.policy, optimizer),
            train_pairs=known.train_pairs,
            eval_pairs=(),
            order=pair_order(recipe, known),
            metrics=MetricsFile(self.to / "metrics.jsonl"),
            total_steps=total_steps(recipe, len(known.train_pairs)),
            pack_tokens=recipe.train.pack_tokens or PACK_TOKENS,
            peak_flops=own_peak(recipe.train.precision),
        )
        return run, known.reference

    def _measure(self, scorer: PairScorer, seed: int, tasks: Sequence[Task]) -> dict[str, Any]:
        """Reward, log-odds and KL to the reference of a policy, and those of each beginning."""
        options = self._options(1, seed)
        prompts = render_prompts(tasks, self.tokenizer, self.context, options)
        engine = TransformersEngine(scorer.causal_model, self.tokenizer, options)
        samples = draw_samples(engine, prompts, self.tokenizer)
        odds = self.classifier.log_odds([sample.text for sample in samples])
        scores = [
            sequence_logps(one, samples, engine.ends, PACK_TOKENS, self.device)
            for one in (scorer.eval(), self.reference)
        ]
        rewards, kls = expit(odds), scores[0] - scores[1]
        return {
            "reward": float(rewards.mean()),
            "kl": float(kls.mean()),
            "log_odds": float(odds.mean()),
            "tokens_mean": float(np.mean([len(sample.ids) for sample in samples])),
            "rewards": _rounded(prompt_means(rewards, samples)),
            "kls": _rounded(prompt_means(kls, samples)),
        }

    def _options(self, samples: int, seed: int) -> GenerateOptions:
        return GenerateOptions(
            engine="transformers",
            temperature=1.0,
            top_p=1.0,
            max_tokens=self.sizes.max_tokens,
            batch_size=self.sizes.batch_size,
            samples=samples,
            dtype="float32",
            seed=seed,
        )


def _groups(samples: Sequence[Sample], odds: Floats, end: int) -> list[dict[str, Any]]:
    """For each beginning: its tokens, and its continuations' tokens and log-odds."""
    found: dict[int, dict[str, Any]] = {}
    for sample, value in zip(samples, odds.tolist(), strict=True):
        prompt = sample.prompt
        group = found.setdefault(
            prompt.index, {"prompt": prompt.ids.tolist(), "responses": [], "log_odds": []}
        )
        group["responses"].append([*sample.ids.tolist(), *([end] if sample.ended else [])])
        group["log_odds"].append(value)
    return list(found.values())


def _table(groups: Sequence[dict[str, Any]]) -> TokenizedPairs:
    """All pairs of continuations of one beginning whose log-odds differ.

    Raises:
        EvalError: there are none.
    """
    rows = []
    for number, group in enumerate(groups):
        prompt, odds = np.asarray(group["prompt"], dtype=np.int32), group["log_odds"]
        texts = [np.asarray(ids, dtype=np.int32) for ids in group["responses"]]
        for i, j in np.argwhere(np.greater.outer(odds, odds)).tolist():
            if len(texts[i]) and len(texts[j]):
                names = ("prompt", "chosen", "rejected")
                tokens = dict(zip(names, (prompt, texts[i], texts[j]), strict=True))
                known = {"row": number, "prompt_key": number, "oddities": 0}
                rows.append({**known, **tokens, "pair_id": pair_id(*tokens.values())})
    if not rows:
        raise EvalError("no two continuations of a beginning differ in reward. Sample more.")
    return TokenizedPairs([pa.Table.from_pylist(rows, schema=SCHEMA)])


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The last step's own numbers, without its speed."""
    names = ("loss", "rewards/accuracies", "rewards/margins", "grad_norm")
    return {name: float(values[name]) for name in names if values.get(name) is not None}


def _rounded(values: Floats) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]
