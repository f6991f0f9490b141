"""Answers: the same whatever was there before, drawn exactly, ended where they end."""

import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mallowspo_cli.errors import EvalError, RecipeError
from mallowspo_cli.evaluation.journal import Journal
from mallowspo_cli.evaluation.sampling import vllm_engine
from mallowspo_cli.evaluation.sampling.stage import (
    Done,
    Prompt,
    generate,
    generation_settings,
    render_prompts,
)
from mallowspo_cli.evaluation.sampling.tasks import GenerateOptions, Task
from mallowspo_cli.evaluation.sampling.transformers_engine import TransformersEngine, _Draw
from mallowspo_cli.evaluation.sampling.vllm_engine import VllmEngine
from mallowspo_cli.models.load import load_model

TASKS = [Task.of(text) for text in ("Hi.", "Say something longer, please.", "Why?", "A", "B b b")]
OPTIONS = GenerateOptions(max_tokens=12, batch_size=2, temperature=1.0, top_p=0.95, samples=2)


@pytest.fixture(scope="module")
def model(tiny_directory: Path) -> Any:
    return load_model(tiny_directory, torch.float32, "sdpa").eval()


@pytest.fixture
def engine(model: Any, tiny_tokenizer: Any) -> TransformersEngine:
    return TransformersEngine(model, tiny_tokenizer, OPTIONS)


def answers(
    place: Path, engine: Any, tokenizer: Any, options: GenerateOptions = OPTIONS
) -> list[dict]:
    prompts = render_prompts(TASKS, tokenizer, 512, options)
    settings = generation_settings(prompts, tokenizer, "tiny", "engine", options)
    with Journal(place / "generations.jsonl", settings) as journal:
        generate(prompts, lambda: engine, tokenizer, "tiny", journal)
        return sorted(journal.lines, key=lambda line: (line["index"], line["sample"]))


class KillError(Exception):
    """A kill between two answers."""


class Cut:
    """An engine that is killed when it has handed on `left` answers."""

    def __init__(self, engine: TransformersEngine, left: int):
        self.engine, self.left = engine, left
        self.name, self.batch_size = engine.name, engine.batch_size

    def answer(self, batch: Sequence[Prompt], missing: Sequence[bool], done: Done) -> None:
        def count(*answer: Any) -> None:
            if self.left == 0:
                raise KillError
            self.left -= 1
            done(*answer)

        self.engine.answer(batch, missing, count)


@pytest.mark.parametrize("left", [0, 1, 3, 4, 9])
def test_a_killed_stage_goes_on_to_the_same_answers(
    tmp_path: Path, engine: TransformersEngine, tiny_tokenizer: Any, left: int
) -> None:
    whole = answers(tmp_path / "whole", engine, tiny_tokenizer)
    with pytest.raises(KillError):
        answers(tmp_path / "cut", Cut(engine, left), tiny_tokenizer)
    kept = (tmp_path / "cut" / "generations.jsonl").read_text().splitlines()[1:]
    assert len(kept) == left
    assert answers(tmp_path / "cut", engine, tiny_tokenizer) == whole
    lines = (tmp_path / "cut" / "generations.jsonl").read_text().splitlines()[1:]
    assert lines[:left] == kept


def test_another_seed_or_sample_gives_another_answer(
    tmp_path: Path, model: Any, tiny_tokenizer: Any
) -> None:
    found = []
    for seed in (0, 1):
        options = other(seed=seed)
        engine = TransformersEngine(model, tiny_tokenizer, options)
        lines = answers(tmp_path / str(seed), engine, tiny_tokenizer, options)
        found.append([line["output"] for line in lines])
    assert all(one != another for one, another in zip(*found, strict=True))
    assert found[0][0] != found[0][1]


def other(**changes: Any) -> GenerateOptions:
    values = {"max_tokens": 12, "batch_size": 2, "temperature": 1.0, "samples": 2, "top_p": 0.95}
    return GenerateOptions(**{**values, **changes})


def test_temperature_0_is_greedy_decoding(tmp_path: Path, model: Any, tiny_tokenizer: Any) -> None:
    options = other(temperature=0.0, samples=1, batch_size=3)
    engine = TransformersEngine(model, tiny_tokenizer, options)
    found = answers(tmp_path, engine, tiny_tokenizer, options)
    for prompt, line in zip(
        render_prompts(TASKS, tiny_tokenizer, 512, options), found, strict=True
    ):
        ids = torch.from_numpy(prompt.ids.astype(np.int64))[None]
        for _ in range(line["tokens"]):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        text = tiny_tokenizer.decode(ids[0, len(prompt.ids) :], skip_special_tokens=True)
        assert line["output"] == text.strip()


def test_draws_follow_the_distribution_and_never_take_what_is_ruled_out() -> None:
    scores = torch.tensor([[0.0, -torch.inf, 1.0, 0.5, -torch.inf]]).expand(4000, -1)
    draw = _Draw(range(4000), 1, torch.device("cpu"))
    taken = draw(torch.zeros(4000, 1), scores).argmax(-1)
    shares = torch.bincount(taken, minlength=5) / 4000
    expected = scores[0].softmax(-1)
    assert shares[1] == shares[4] == 0
    assert torch.allclose(shares, expected, atol=4 * (0.25 / 4000) ** 0.5)


def test_a_draw_at_the_very_ends_takes_a_possible_token() -> None:
    draw = _Draw([0], 1, torch.device("cpu"))
    scores = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for number, token in ((0.0, 1), (1.0 - 2**-53, 2)):
        draw.step, draw.numbers = 0, torch.tensor([[number]], dtype=torch.float64)
        assert draw(torch.zeros(1, 1), scores).argmax(-1).item() == token


def test_an_answer_ends_before_its_end_token_or_at_its_longest_length(
    tmp_path: Path, engine: TransformersEngine, tiny_tokenizer: Any
) -> None:
    engine.ends = list(range(0, engine.model.config.vocab_size, 20))
    found = answers(tmp_path, engine, tiny_tokenizer)
    assert {line["finish"] for line in found} == {"stop", "length"}
    for line in found:
        assert (line["finish"] == "length") == (line["tokens"] == 12)


def test_the_context_bounds_an_answer_and_a_full_one_is_refused(tiny_tokenizer: Any) -> None:
    longest = max(len(p.ids) for p in render_prompts(TASKS, tiny_tokenizer, None, OPTIONS))
    prompts = render_prompts(TASKS, tiny_tokenizer, longest + 5, OPTIONS)
    assert min(p.most_tokens for p in prompts) == 5
    with pytest.raises(EvalError, match="no room for an answer"):
        render_prompts(TASKS, tiny_tokenizer, longest, OPTIONS)


def test_a_tokenizer_without_template_is_refused(tiny_tokenizer: Any) -> None:
    class Bare:
        chat_template, name_or_path = None, "bare"

    with pytest.raises(EvalError, match=r"model\.chat_template="):
        render_prompts(TASKS, Bare(), None, OPTIONS)  # type: ignore[arg-type]


def test_settings_tell_prompts_and_template_but_not_the_batch_size(tiny_tokenizer: Any) -> None:
    def settings(tasks: list[Task] = TASKS, **changes: Any) -> dict[str, Any]:
        options = other(**changes)
        prompts = render_prompts(tasks, tiny_tokenizer, 512, options)
        return generation_settings(prompts, tiny_tokenizer, "m", "e", options)

    assert settings() == settings(batch_size=5)
    assert settings() != settings(seed=1)
    assert settings() != settings(TASKS[:-1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"max_tokens": 0},
        {"engine": "tgi"},
        {"dtype": "float16"},
        {"samples": 2, "temperature": 0.0},
    ],
)
def test_options_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"generate.{next(iter(wrong))}"):
        GenerateOptions(**wrong)


def test_vllm_gets_the_same_token_ids_with_a_seed_for_each_answer(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    class LLM:
        def __init__(self, **options: Any):
            seen["options"] = options

        def generate(self, requests: list[dict], params: list[Any], use_tqdm: bool) -> list[Any]:
            assert not use_tqdm
            seen["requests"], seen["params"] = requests, params
            one = types.SimpleNamespace(token_ids=[72, 105, 2], finish_reason="stop")
            return [types.SimpleNamespace(outputs=[one]) for _ in requests]

    module = types.ModuleType("vllm")
    module.LLM = LLM  # type: ignore[attr-defined]
    module.SamplingParams = lambda **values: values  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "vllm", module)
    monkeypatch.setattr(
        "mallowspo_cli.evaluation.sampling.vllm_engine.vllm_installed", lambda: True
    )
    monkeypatch.setattr(vllm_engine, "version", lambda _: "9")
    options = other()
    engine = VllmEngine(tmp_path / "model", "bfloat16", [2], options)
    answers(tmp_path, engine, tiny_tokenizer, options)
    prompts = {p.stream(0): p for p in render_prompts(TASKS, tiny_tokenizer, 512, options)}
    assert len(seen["requests"]) == len(prompts) == 10
    for request, params in zip(seen["requests"], seen["params"], strict=True):
        assert request["prompt_token_ids"] == prompts[params["seed"]].ids.tolist()
        assert params["stop_token_ids"] == [2]
        assert params["top_k"] == -1
    assert seen["options"]["trust_remote_code"] is False
    lines = (tmp_path / "generations.jsonl").read_text().splitlines()[1:]
    assert {json.loads(line)["tokens"] for line in lines} == {2}


def test_without_vllm_its_engine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mallowspo_cli.evaluation.sampling.vllm_engine.vllm_installed", lambda: False
    )
    with pytest.raises(EvalError, match=r"generate\.engine=transformers"):
        VllmEngine(tmp_path, "float32", [2], OPTIONS)


def test_a_model_with_learned_positions_is_not_led_behind_its_context(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tiny_tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )  # fmt: skip
    options = other(max_tokens=64, samples=1, batch_size=5)
    engine = TransformersEngine(GPT2LMHeadModel(config), tiny_tokenizer, options)
    engine.ends = [2**31 - 1]
    prompts = render_prompts(TASKS, tiny_tokenizer, 64, options)
    settings = generation_settings(prompts, tiny_tokenizer, "gpt2", "e", options)
    with Journal(tmp_path / "g.jsonl", settings) as journal:
        generate(prompts, lambda: engine, tiny_tokenizer, "gpt2", journal)
        found = {line["index"]: line["tokens"] for line in journal.lines}
    assert found == {p.index: 64 - len(p.ids) for p in prompts}
