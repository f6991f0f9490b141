"""Classifiers of sentiment, and what a policy's continuations get and cost."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from mallowspo_cli.data.tokenize import TokenIds
from mallowspo_cli.errors import EvalError, ModelError
from mallowspo_cli.evaluation.controlled import classifiers
from mallowspo_cli.evaluation.controlled.classifiers import (
    TransformersClassifier,
    accuracy,
    fit_tfidf,
    tfidf_classifier,
)
from mallowspo_cli.evaluation.controlled.reviews import Reviews
from mallowspo_cli.evaluation.controlled.sentiment import (
    Measured,
    Sample,
    draw_samples,
    sample_rows,
    sequence_logps,
    summarise,
    whole_text,
)
from mallowspo_cli.evaluation.sampling.stage import Done, Prompt
from mallowspo_cli.evaluation.sampling.tasks import Task
from mallowspo_cli.models.load import load_model, load_tokenizer
from mallowspo_cli.scoring import PairScorer

CPU = torch.device("cpu")
GOOD, BAD = ("splendid", "moving", "witty"), ("dreary", "clumsy", "hollow")


def own_reviews(count: int = 120) -> Reviews:
    """Reviews by the project in which three words each decide; every tenth has the other label."""
    texts = [
        f"Film number {i}, seen on day {i % 7}: a {(GOOD if i % 2 else BAD)[i % 3]} story"
        for i in range(count)
    ]
    labels = [i % 2 if i % 10 else 1 - i % 2 for i in range(count)]
    return Reviews("own reviews", texts, labels)


def test_the_classifier_learns_which_words_are_positive_and_says_how_often_it_is_right() -> None:
    found = fit_tfidf(own_reviews())
    good, bad, unknown = found.log_odds(["splendid and witty", "dreary", "qwerty"])
    assert bad < unknown < good
    # 2 of the 20 held-out reviews have the other label, 9 and 10 rounds in.
    assert found.about["held_out"] == 20
    assert found.about["fitted_on"] == 100
    assert found.about["accuracy"] == 0.9
    assert found.about["accuracy_low"] < 0.9 < found.about["accuracy_high"]


def test_accuracy_is_measured_on_whole_texts_and_on_their_first_words() -> None:
    class Counting:
        def __init__(self) -> None:
            self.about = {}

        def log_odds(self, texts: Sequence[str]) -> np.ndarray:
            return np.asarray([len(text.split()) - 50.0 for text in texts])

    found = accuracy(Counting(), ["word " * 60, "word " * 60, "few words"], [1, 0, 0])
    assert found["accuracy"] == pytest.approx(2 / 3)
    # The first 40 words are below 50.
    assert found["accuracy_short"] == pytest.approx(2 / 3)
    assert found["accuracy_short_low"] == pytest.approx(found["accuracy_low"])
    assert (found["held_out"], found["short_words"]) == (3, 40)


def test_a_fitted_classifier_is_kept_by_content_and_holds_no_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path))
    first = tfidf_classifier(own_reviews())
    (file,) = (tmp_path / "classifiers").glob("*.npz")
    with np.load(file, allow_pickle=False) as stored:
        assert all(stored[name].dtype != object for name in stored.files)
    monkeypatch.setattr(classifiers, "fit_tfidf", lambda _: pytest.fail("fitted again"))
    second = tfidf_classifier(own_reviews())
    texts = ["a splendid story", "clumsy", ""]
    np.testing.assert_array_equal(first.log_odds(texts), second.log_odds(texts))
    assert first.about == second.about
    monkeypatch.undo()
    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path))
    tfidf_classifier(own_reviews(130))
    assert len([*(tmp_path / "classifiers").glob("*.npz")]) == 2


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"{}"])
def test_a_damaged_classifier_is_fitted_again(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path))
    first = tfidf_classifier(own_reviews())
    (file,) = (tmp_path / "classifiers").glob("*.npz")
    whole = file.read_bytes()
    file.write_bytes(content)
    assert tfidf_classifier(own_reviews()).about == first.about
    assert len(file.read_bytes()) == len(whole)


def test_reviews_without_words_give_no_classifier() -> None:
    marks = Reviews("marks", [f"{'!' * i}" for i in range(1, 31)], [i % 2 for i in range(30)])
    with pytest.raises(EvalError, match="no classifier of marks"):
        fit_tfidf(marks)


@pytest.fixture(scope="module")
def classifier_directory(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """A tiny random sequence classifier whose second of three labels is positive."""
    place = tmp_path_factory.mktemp("classifier")
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=tiny_tokenizer.pad_token_id,
        num_labels=3,
        id2label={0: "NEGATIVE", 1: "Positive", 2: "neutral"},
        label2id={"NEGATIVE": 0, "Positive": 1, "neutral": 2},
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(place)
    tiny_tokenizer.save_pretrained(place)
    return place


def test_a_sequence_classifiers_log_odds_are_those_of_its_positive_label(
    classifier_directory: Path, tiny_tokenizer
) -> None:
    found = TransformersClassifier.load(classifier_directory, "own", CPU)
    assert found.about["positive_label"] == "Positive"
    texts = ["fine", "a much longer text", "x"]
    for text, odds in zip(texts, found.log_odds(texts), strict=True):
        with torch.no_grad():
            logits = found.model(**tiny_tokenizer(text, return_tensors="pt")).logits[0]
        share = float(logits.double().softmax(0)[1])
        assert odds == pytest.approx(math.log(share / (1 - share)), abs=1e-4)
    # Longer than the model can read.
    assert np.isfinite(found.log_odds(["word " * 40])).all()


def test_a_classifier_trained_on_in_its_place_is_another_one(
    classifier_directory: Path, tmp_path: Path
) -> None:
    place = shutil.copytree(classifier_directory, tmp_path / "own")
    before = TransformersClassifier.load(place, "own", CPU)
    assert TransformersClassifier.load(place, "own", CPU).about == before.about
    with torch.no_grad():
        before.model.score.weight.mul_(1.01)
    before.model.save_pretrained(place)
    assert TransformersClassifier.load(place, "own", CPU).about != before.about


def test_the_positive_label_can_be_named_and_has_to_be_where_none_is_told_by_its_name(
    classifier_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = TransformersClassifier.load(classifier_directory, "own", CPU, "neutral")
    assert named.positive == 2
    with pytest.raises(EvalError, match="NEGATIVE, Positive, neutral, and positive=good"):
        TransformersClassifier.load(classifier_directory, "own", CPU, "good")
    for file in classifier_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EvalError, match="LABEL_0, LABEL_1, LABEL_2, and no positive="):
        TransformersClassifier.load(tmp_path, "own", CPU)


def test_a_language_model_or_a_pickle_is_no_classifier(
    tiny_directory: Path, classifier_directory: Path, tmp_path: Path
) -> None:
    # transformers would go on with a random head.
    with pytest.raises(ModelError, match=r"no sequence classifier: its weights lack score"):
        TransformersClassifier.load(tiny_directory, "tiny", CPU)
    for file in classifier_directory.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load the classifier"):
        TransformersClassifier.load(tmp_path, "pickled", CPU)


class Scripted:
    """An engine that answers prompt i's sample j with given tokens, in batches of two."""

    name, batch_size = "scripted", 2

    def __init__(self, answers: dict[tuple[int, int], tuple[list[int], str]]) -> None:
        self.answers = answers

    def answer(self, batch: Sequence[Prompt], missing: Sequence[bool], done: Done) -> None:
        assert len(batch) <= 2
        assert all(missing)
        # The shortest is done first, as when sampling.
        for prompt in sorted(batch, key=lambda p: len(self.answers[p.index, p.sample][0])):
            ids, finish = self.answers[prompt.index, prompt.sample]
            done(prompt, np.asarray(ids, dtype=np.int32), finish)


def prompt_of(text: str, index: int, sample: int, tokenizer) -> Prompt:
    ids = np.asarray(tokenizer(text)["input_ids"], dtype=np.int32)
    return Prompt(index, sample, Task.of(text), ids, 9)


def test_samples_come_back_in_the_prompts_order_with_their_whole_text(tiny_tokenizer) -> None:
    texts = ["A fil", "It was", "So"]
    prompts = [prompt_of(t, i, j, tiny_tokenizer) for i, t in enumerate(texts) for j in (0, 1)]
    ids = tiny_tokenizer("m again")["input_ids"]
    answers = {(p.index, p.sample): (ids[: 1 + p.index + p.sample], "stop") for p in prompts}
    answers[2, 1] = (ids, "length")
    found = draw_samples(Scripted(answers), prompts, tiny_tokenizer)
    assert [sample.prompt for sample in found] == prompts
    assert found[0].text == "A film"
    assert found[5].text == "Som again"
    assert [sample.ended for sample in found] == [True] * 5 + [False]
    assert all(sample.continued for sample in found)


def test_what_a_chat_template_adds_is_not_read_by_the_classifier(tiny_tokenizer) -> None:
    task = Task.of("A film")
    turns = [message.as_dict() for message in task.messages]
    ids = tiny_tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    chat = Prompt(0, 0, task, np.asarray(ids, dtype=np.int32), 9)
    answer = np.asarray(tiny_tokenizer(" yes")["input_ids"], dtype=np.int32)
    assert whole_text(chat, answer, tiny_tokenizer) == ("A film yes", False)
    begun = np.append(tiny_tokenizer.bos_token_id, tiny_tokenizer("A film")["input_ids"])
    plain = Prompt(0, 0, task, begun.astype(np.int32), 9)
    assert whole_text(plain, answer, tiny_tokenizer) == ("A film yes", True)


@pytest.fixture(scope="module")
def scorer(tiny_directory: Path) -> PairScorer:
    return PairScorer(load_model(tiny_directory, torch.float32)).eval()


def logp(scorer: PairScorer, prompt: TokenIds, ids: list[int]) -> float:
    """Summed log-probs of `ids` after the prompt, by plain arithmetic."""
    whole = torch.tensor([[*prompt.tolist(), *ids]])
    with torch.no_grad():
        rows = scorer.causal_model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(1)
    return float(rows.gather(1, torch.tensor(ids)[:, None]).sum())


def samples_of(tokenizer, answers: list[tuple[int, list[int], bool]]) -> list[Sample]:
    return [
        Sample(
            prompt_of(f"Beginning {'x' * index}", index, 0, tokenizer),
            np.asarray(ids, dtype=np.int32),
            ended,
            f"text {index}",
            True,
        )
        for index, ids, ended in answers
    ]


@pytest.mark.parametrize("ends", [[257], [257, 10], [257, 10, 11]])
def test_log_probs_are_those_of_the_tokens_and_of_any_end(
    ends: list[int], scorer: PairScorer, tiny_tokenizer
) -> None:
    # One, two and three samples of a prompt; cut ones beside ended ones; one that ended at once.
    answers = [(0, [5, 6], False), (1, [7], True), (1, [8, 9, 4], False)]
    answers += [(2, [], True), (2, [3, 3], True), (2, [9], False)]
    samples = samples_of(tiny_tokenizer, answers)
    for pack_tokens in (4096, 40):
        found = sequence_logps(scorer, samples, ends, pack_tokens, CPU)
        for sample, value in zip(samples, found, strict=True):
            ids, prompt = sample.ids.tolist(), sample.prompt.ids
            expected = (
                np.logaddexp.reduce([logp(scorer, prompt, [*ids, end]) for end in ends])
                if sample.ended
                else logp(scorer, prompt, ids)
            )
            assert value == pytest.approx(expected, rel=1e-4)


def test_the_summary_is_of_prompts_not_of_samples(tiny_tokenizer) -> None:
    answers = [(index, [5], index < 2) for index in (0, 0, 1, 1, 2, 2)]
    samples = samples_of(tiny_tokenizer, answers)
    odds, ratios = np.asarray([-9.0, 9, 0, 0, 2, 4]), np.asarray([1.0, 3, 0, 4, 2, 2])
    found = Measured(samples, ratios, samples)
    results = summarise(found, odds, odds - 1)
    assert results["reward"]["value"] == pytest.approx(np.mean(1 / (1 + np.exp(-odds))))
    assert results["reward"]["prompts"] == 3
    assert results["log_odds"]["value"] == pytest.approx(1)
    # Each prompt's mean is 2: nothing is left to vary.
    assert (results["kl"]["value"], results["kl"]["low"], results["kl"]["high"]) == (2, 2, 2)
    gain = results["reward"]["value"] - results["reference_reward"]["value"]
    assert results["reward_gain"]["value"] == pytest.approx(gain)
    assert results["ended"] == pytest.approx(2 / 3)
    rows = sample_rows(found, odds, odds - 1)
    assert [row["model"] for row in rows] == ["policy"] * 6 + ["reference"] * 6
    assert [row["log_ratio"] for row in rows] == [*ratios, *[None] * 6]
    assert rows[1]["reward"] == pytest.approx(1 / (1 + math.exp(-9)))


def test_without_a_reference_there_is_neither_kl_nor_gain(tiny_tokenizer) -> None:
    samples = samples_of(tiny_tokenizer, [(0, [5], True), (1, [6], True)])
    results = summarise(Measured(samples, None, None), np.zeros(2), None)
    assert results["reward"]["value"] == 0.5
    assert results["kl"] is results["reference_reward"] is results["reward_gain"] is None


def test_the_plain_template_leaves_a_beginning_as_it_is(tiny_directory: Path) -> None:
    tokenizer = load_tokenizer(tiny_directory, "plain")
    turns = [message.as_dict() for message in Task.of("This film is ").messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert str(text).endswith("This film is ")
