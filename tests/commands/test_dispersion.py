"""`mallowspo dispersion`: what the index does to the data, without a model where the store is."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mallowspo_cli.reference import build
from tests.commands.conftest import Command
from tests.conftest import pair_rows


def report(tmp_path: Path, name: str = "tiny-dispersion") -> dict:
    return json.loads((tmp_path / "reports" / name / "dispersion.json").read_text())


def test_the_report_agrees_with_what_training_does_to_the_pairs(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    done = mallowspo("dispersion", *tiny_words)
    assert done.code == 0, done.err
    assert done.out.strip() == "reports/tiny-dispersion/report.html"
    assert mallowspo("train", *tiny_words, "train.max_steps=1").code == 0
    trained = json.loads((tmp_path / "runs/tiny/dispersion.json").read_text())
    found = report(tmp_path)
    assert found["scale"] == trained["scale"]
    assert found["weight"]["pairs"] == trained["pairs"] == 12
    assert found["weight"]["mean"] == pytest.approx(trained["weight_mean"])
    assert found["effective_beta"]["mean"] == pytest.approx(0.3 * found["weight"]["mean"])
    table = pq.read_table(tmp_path / "reports/tiny-dispersion/pairs.parquet").to_pydict()
    assert max(table["weight"]) == pytest.approx(trained["weight_max"])
    assert table["effective_beta"] == pytest.approx([0.3 * w for w in table["weight"]])


def test_no_model_is_loaded_where_the_store_is_there(
    mallowspo: Command, tiny_words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mallowspo("cache-ref", *tiny_words).code == 0
    monkeypatch.setattr(build, "load_model", None)
    assert mallowspo("dispersion", *tiny_words, "dispersion.pooling=tokens").code == 0


def test_the_page_holds_numbers_pictures_and_the_prompts_at_both_ends(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    rows = pair_rows(16)
    rows[3]["prompt"] = "Is 3 < 4 & 5?"
    write_rows([{**row, "w": 1 + index % 5 + (index == 3) * 9} for index, row in enumerate(rows)])
    words = [*tiny_words, "dataset.eval_size=0", "to=here"]
    words += ["dispersion.source=column", "dispersion.column=w", "dispersion.scale=1"]
    assert mallowspo("dispersion", *words).code == 0
    page = (tmp_path / "here" / "report.html").read_text()
    assert page.count("data:image/png;base64") == 2
    assert "w = 1.0000 times column w." in page
    first_row = page.partition("Least dispersed prompts")[2]
    assert first_row.index("Is 3 &lt; 4 &amp; 5?") < first_row.index("Say ")
    found = json.loads((tmp_path / "here" / "dispersion.json").read_text())
    heads = list(found["prompts"].values())
    assert [heads[0][0]["w"], heads[1][0]["w"]] == [13, 1]
    assert "NaN" not in (tmp_path / "here" / "dispersion.json").read_text()
    assert found["share_outside_half_to_two"] == pytest.approx(9 / 16)


def test_parts_of_a_mixture_and_raters_are_told_apart(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    rated = [
        {
            "prompt": f"Which of {index}?",
            "responses": [f"This {index}", "That" + "!" * index],
            "rater_scores": [[2, 1]] * (4 + index % 3) + [[1, 2]] * (index % 4),
        }
        for index in range(12)
    ]
    one = write_rows(pair_rows(12), "one.jsonl")
    two = write_rows(rated, "two.jsonl")
    (tmp_path / "dataset").mkdir()
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        "defaults:\n  - base\n  - model: tiny_random\n  - objective: mallows_theta\n  - _self_\n"
        "name: mixed\ndataset:\n  path: null\n  eval_split: null\n  parts:\n"
        f"    plain: {{path: {one}}}\n    rated: {{path: {two}}}\n"
        "train:\n  precision: fp32\n"
    )
    done = mallowspo("dispersion", f"recipe={recipe}")
    assert done.code == 0, done.err
    found = report(tmp_path, "mixed-dispersion")
    assert {name: row["pairs"] for name, row in found["by_source"].items()} == {
        "plain": 12,
        "rated": 12,
    }
    assert found["correlations"]["rater_agreement"]["pairs"] == 12
    assert found["correlations"]["response_tokens"]["pairs"] == 24
    raters = mallowspo("dispersion", f"recipe={recipe}", "dispersion.source=raters", "to=raters")
    assert raters.code == 0, raters.err
    by_raters = json.loads((tmp_path / "raters" / "dispersion.json").read_text())
    # The pairs without raters have w = 1, the others mean 1 by the scale.
    assert by_raters["unknown"] == 12
    assert by_raters["by_source"]["plain"]["quantiles"]["0.99"] == 1
    assert by_raters["weight"]["mean"] == pytest.approx(1)
    assert by_raters["correlations"]["rater_agreement"]["value"] == pytest.approx(1)


def test_data_without_raters_is_refused_in_one_line(
    mallowspo: Command, tiny_words: list[str]
) -> None:
    done = mallowspo("dispersion", *tiny_words, "dispersion.source=raters")
    assert done.code == 2
    assert re.search(r"source=raters needs the scores of several raters, and .* has none", done.err)
