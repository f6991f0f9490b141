"""`mallowspo eval generations`: from an evaluation's directory, and by sampling itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mallowspo_cli.commands.eval_generations import run
from mallowspo_cli.errors import EvalError, MallowsPOError
from mallowspo_cli.evaluation.preference import TERCILES
from tests.commands.conftest import Command
from tests.conftest import pair_rows


def write_generations(
    place: Path, prompts: int = 12, samples: int = 3, dispersion: bool = True
) -> Path:
    """Answers that are the more diverse, the higher the entropy of their prompt."""
    place.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"seed": 0}]
    for index in range(prompts):
        for sample in range(samples):
            own = [f"w{sample}_{word}" for word in range(index)]
            same = [f"common{word}" for word in range(prompts - index)]
            lines.append(
                {
                    "index": index,
                    "sample": sample,
                    "instruction": f"Say {index}",
                    "output": " ".join(same + own),
                    "tokens": 2 * prompts,
                    "finish": "length" if sample == 0 else "stop",
                }
            )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (place / "generations.jsonl").write_text(text)
    if dispersion:
        entropies = {f"Say {index}": (index + 1) / (prompts + 1) for index in range(prompts)}
        found = {"reference": "a-model 1234", "entropy": entropies, "left_out": []}
        (place / "dispersion.json").write_text(json.dumps(found))
    return place


def results_in(place: Path) -> dict[str, Any]:
    return json.loads((place / "diversity.json").read_text())


def test_diversity_is_reported_overall_and_by_dispersion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = write_generations(tmp_path / "alpacaeval")
    run([f"from={place}"])
    found = results_in(place)
    assert (found["prompts"], found["samples"], found["left_out"]) == (12, 3, 0)
    assert found["metrics"]["cut"]["value"] == pytest.approx(1 / 3)
    assert found["terciles"] == dict.fromkeys(TERCILES, 4)
    low, high = (
        found["by_dispersion"][third]["tfidf_diversity"]["value"]
        for third in ("low_dispersion", "high_dispersion")
    )
    gap = found["high_minus_low"]["tfidf_diversity"]
    assert gap["value"] == pytest.approx(high - low)
    assert 0 < gap["low"] < gap["value"] < gap["high"]
    assert found["high_minus_low"]["self_bleu"]["high"] < 0
    report = (place / "generations_report.md").read_text()
    assert "high dispersion differ more from each other" in report
    assert "under a-model 1234" in report
    assert "high dispersion differ more" in capsys.readouterr().out
    assert (place / "diversity.png").read_bytes().startswith(b"\x89PNG")


def test_without_entropies_the_terciles_are_unknown_and_the_report_says_so(tmp_path: Path) -> None:
    place = write_generations(tmp_path / "alpacaeval", dispersion=False)
    run([f"from={place}"])
    found = results_in(place)
    assert found["by_dispersion"] == found["high_minus_low"] == {}
    assert "no dispersion.json" in (place / "generations_report.md").read_text()


def test_with_one_answer_a_prompt_the_report_says_which_option_gives_more(tmp_path: Path) -> None:
    place = write_generations(tmp_path / "alpacaeval", samples=1)
    run([f"from={place}"])
    found = results_in(place)["metrics"]
    for name in ("self_bleu", "tfidf_diversity", "between_2"):
        assert found[name] == {"value": None, "low": None, "high": None, "prompts": 0}
    assert found["distinct_1"]["value"] == 1
    assert "generate.samples=4" in (place / "generations_report.md").read_text()


def test_prompts_with_fewer_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    place = write_generations(tmp_path / "alpacaeval")
    file = place / "generations.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    run([f"from={place}"])
    assert (results_in(place)["prompts"], results_in(place)["left_out"]) == (11, 1)
    assert "Left out: 1 prompts" in (place / "generations_report.md").read_text()


@pytest.mark.parametrize(
    "content", ['{"entropy": 3}', "{}", '{"reference": "", "entropy": {"a": 2}}']
)
def test_entropies_that_are_none_are_refused(content: str, tmp_path: Path) -> None:
    place = write_generations(tmp_path / "alpacaeval")
    (place / "dispersion.json").write_text(content)
    with pytest.raises(EvalError, match=r"dispersion\.json"):
        run([f"from={place}"])


@pytest.fixture
def trained(mallowspo: Command, tiny_words: list[str], tmp_path: Path) -> Path:
    assert mallowspo("train", *tiny_words).code == 0
    return tmp_path / "runs" / "tiny"


def test_a_runs_only_generations_are_found_and_of_several_one_has_to_be_named(
    trained: Path,
) -> None:
    with pytest.raises(EvalError, match="no generations of tiny are there"):
        run(["model=runs/tiny"])
    place = write_generations(trained / "evaluations" / "winrate-data")
    # What the other side of a comparison said.
    write_generations(place / "against")
    run(["model=runs/tiny"])
    assert results_in(place)["model"] == "runs/tiny"
    write_generations(trained / "evaluations" / "alpacaeval")
    with pytest.raises(EvalError, match=r"from=.*alpacaeval or from=.*winrate-data"):
        run(["model=runs/tiny"])


def test_it_samples_four_answers_to_each_prompt_of_a_dataset_with_their_dispersion(
    trained: Path, write_rows: Callable[..., Path]
) -> None:
    data = write_rows(pair_rows(16), "other.jsonl")
    words = ["dataset=local", f"dataset.path={data}", "dataset.eval_size=6", "eval.limit=5"]
    sampling = ["generate.max_tokens=8", "generate.dtype=float32"]
    run(["model=runs/tiny", *words, *sampling])
    (place,) = (trained / "evaluations").glob("generations-*")
    found = results_in(place)
    assert (found["prompts"], found["samples"]) == (5, 4)
    assert found["metrics"]["tokens"]["value"] <= 8
    assert sum(found["terciles"].values()) == 5
    before = (place / "generations.jsonl").read_text()
    run(["model=runs/tiny", *words, *sampling])
    assert (place / "generations.jsonl").read_text() == before
    with pytest.raises(EvalError, match="max_tokens was 8, is 9"):
        run(["model=runs/tiny", *words, "generate.max_tokens=9", "generate.dtype=float32"])


def test_a_bare_model_answers_instructions(
    write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_rows([{"instruction": f"Say {i}"} for i in range(3)], "own.jsonl")
    run(
        ["model=tiny_random", f"instructions={file}", "generate.max_tokens=6", "generate.samples=2"]
    )
    found = results_in(tmp_path / "reports" / "generations-own-tiny_random")
    assert (found["prompts"], found["samples"], found["terciles"]) == (3, 2, {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "found no model= and no from="),
        (["from=none"], r"holds no generations\.jsonl"),
        (["model=tiny_random", "generate.samples=2"], "about sampling"),
        (["model=tiny_random", "dataset.path=x"], "about sampling"),
        (["dataset=imdb"], "give model="),
        (["model=tiny_random", "from=x", "dataset=imdb"], "no from="),
        (["model=tiny_random", "instructions=x", "reference=y"], "without dataset=NAME"),
        (["model=tiny_random", "instruction=x"], "no word of this command"),
        (["model=tiny_random"], "no generations of tiny_random"),
    ],
)
def test_words_that_cannot_be_used_are_refused(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MallowsPOError, match=message):
        run(words)
