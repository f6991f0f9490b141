"""Every key of every recipe is explained."""

from mallowspo_cli.recipe.keys import explained_keys


def test_every_key_has_a_default_and_a_meaning() -> None:
    rows = list(explained_keys())
    assert {"train.learning_rate", "model.lora.rank", "objective.link", "output_dir"} <= {
        key for key, _, _ in rows
    }
    assert [key for key, default, meaning in rows if not default or not meaning] == []


def test_defaults_are_those_of_the_schema() -> None:
    found = {key: default for key, default, _ in explained_keys()}
    assert found["train.global_batch_size"] == "64"
    assert found["dataset.truncation"] == "drop"
    assert found["train.max_steps"] == "null"
    assert found["model.source"] == "(choose)"
