"""Words with several values become composed jobs with names of their own, in Hydra's grammar."""

from pathlib import Path

import pytest

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.mallows import MallowsTheta
from mallowspo_cli.recipe.find import recipe_files
from mallowspo_cli.recipe.load import load_recipe
from mallowspo_cli.recipe.sweep import expand, read_axis
from mallowspo_cli.recipe.sweep_names import job_names, labels_of, safe


def refusal(recipe: str, *words: str) -> str:
    with pytest.raises(RecipeError) as caught:
        expand(recipe, words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_choice_is_a_job_and_the_last_key_is_the_fastest() -> None:
    sweep = expand("quickstart", ["objective=dpo,mallows_theta", "train.epochs=2", "seed=0,1"])
    assert sweep.name == "quickstart-objective-seed"
    assert sweep.directory == Path("runs/quickstart-objective-seed")
    assert sweep.keys == ("objective", "seed")
    assert sweep.fixed == ("recipe=quickstart", "train.epochs=2")
    assert [job.name for job in sweep.jobs] == [
        *("dpo-seed0", "dpo-seed1", "mallows_theta-seed0", "mallows_theta-seed1"),
    ]
    assert [job.values for job in sweep.jobs][1] == {"objective": "dpo", "seed": 1}
    recipes = [job.loaded.recipe for job in sweep.jobs]
    assert [type(recipe.objective) for recipe in recipes] == [DPO, DPO, MallowsTheta, MallowsTheta]
    assert [recipe.seed for recipe in recipes] == [0, 1, 0, 1]
    assert {recipe.train.epochs for recipe in recipes} == {2}
    assert sweep.joined == ()


def test_a_jobs_words_compose_to_the_job_and_its_directory_lies_in_the_sweeps() -> None:
    sweep = expand("quickstart", ["objective.beta=0.1,0.3", "name=betas"])
    for job in sweep.jobs:
        recipe, *overrides = job.words
        again = load_recipe(recipe.removeprefix("recipe="), overrides)
        assert again == job.loaded
        assert job.directory == Path("runs/betas") / job.name
    elsewhere = expand("quickstart", ["seed=1,2", "output_dir=/some where/else"])
    assert [str(job.directory) for job in elsewhere.jobs] == [
        *("/some where/else/seed1", "/some where/else/seed2"),
    ]
    assert load_recipe("quickstart", list(elsewhere.jobs[0].words[1:])) == elsewhere.jobs[0].loaded


@pytest.mark.parametrize(
    ("word", "words", "values"),
    [
        ("a=1,2", ["a=1", "a=2"], [1, 2]),
        ("a=choice(1,2)", ["a=1", "a=2"], [1, 2]),
        ("a=choice(3)", ["a=3"], [3]),
        ("a=range(1,4)", ["a=1", "a=2", "a=3"], [1, 2, 3]),
        ("a=range(0,1,0.5)", ["a=0.0", "a=0.5"], [0.0, 0.5]),
        ("a=sort(3,1,2)", ["a=1", "a=2", "a=3"], [1, 2, 3]),
        ("a=1e-5,3e-6", ["a=1e-05", "a=3e-06"], [1e-5, 3e-6]),
        ("a=[0,0.5],null", ["a=[0,0.5]", "a=null"], ["[0,0.5]", None]),
        ("a='b c',\"d,e\"", ["a='b c'", 'a="d,e"'], ["b c", "d,e"]),
        ("a.b=true,false", ["a.b=True", "a.b=False"], [True, False]),
        ("+a=1,2", ["+a=1", "+a=2"], [1, 2]),
        ("recipe=a,./b.yaml", ["recipe=a", "recipe=./b.yaml"], ["a", "./b.yaml"]),
    ],
)
def test_hydras_grammar_is_read(word: str, words: list[str], values: list) -> None:
    axis = read_axis(word)
    assert axis.swept
    assert list(axis.words) == words
    assert list(axis.values) == values


@pytest.mark.parametrize("word", ["a=1", "a='1,2'", "a=[1,2]", "recipe=./my #1.yaml", "a="])
def test_one_value_is_kept_as_it_was_written(word: str) -> None:
    axis = read_axis(word)
    assert not axis.swept
    assert axis.words == (word,)


def test_glob_chooses_among_the_options_of_a_group_and_among_recipes() -> None:
    axis = read_axis("objective=glob([quickstart_*,dpo],exclude=*_sft)")
    assert {"quickstart_phi", "quickstart_rainbow", "dpo"} <= set(axis.values)
    assert all(str(v) == "dpo" or str(v).startswith("quickstart_") for v in axis.values)
    assert "quickstart_rainbow_sft" not in axis.values
    recipes = expand("glob(hh_*,exclude=*_sft)", [])
    assert recipes.name == "recipes"
    assert [job.name for job in recipes.jobs] == [
        name for name in recipe_files() if name.startswith("hh_") and not name.endswith("_sft")
    ]
    assert [job.words[0] for job in recipes.jobs] == [f"recipe={j.name}" for j in recipes.jobs]


def test_a_recipe_may_be_a_file_whose_name_hydra_could_not_read(tmp_path: Path) -> None:
    file = tmp_path / "my #1.yaml"
    file.write_text(load_recipe("quickstart").to_yaml())
    sweep = expand(str(file), ["seed=1,2"])
    assert sweep.name == "my_1-seed"
    assert [job.loaded.source for job in sweep.jobs] == [file, file]


def test_choices_that_compose_to_the_same_run_are_one_job_and_said() -> None:
    sweep = expand("quickstart", ["objective=dpo,imdb_dpo,mallows_theta"])
    # dpo and mallows_theta have the same knobs, and are not the same.
    assert [job.name for job in sweep.jobs] == ["dpo", "mallows_theta"]
    assert sweep.joined == (("imdb_dpo", "dpo"),)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.epochs=2"], "no key has several values"),
        (["objective.beta=interval(0,1)"], "objective.beta=range(LOW,HIGH,STEP)"),
        (["seed=1,2", "train.lerning_rate=1"], "Did you mean train.learning_rate?"),
        (["objective=dpo,dpoo"], "no objective named 'dpoo'. Did you mean 'dpo'?"),
        (["objective.beta=0.1,-1"], "beta=-1.0"),
        (["dispersion.mode=glob(*)"], "It takes recipe, model, dataset, objective."),
        (["objective=glob(no_such*)"], "fits no name. There are: "),
        (["seed=1,2,1"], "'seed=1,2,1' names 1 twice"),
        (["seed=1,2", "seed=3"], "seed is given twice"),
        (["seed=1,2", "name=a,b"], "name is the sweep's own"),
        (["seed=1,2", "name=../up"], "name=../up cannot name a directory"),
        (["seed=1,2", "dataset.path=a#b"], "cannot read 'dataset.path=a#b'"),
        (["seed=1,2", "~train"], "takes a key away"),
        (["objective=dpo,simpo", "objective.home_advantage=0.1,0.3"], "is not a key of DPO"),
    ],
)
def test_what_cannot_be_swept_is_one_line(words: list[str], said: str) -> None:
    assert said in refusal("quickstart", *words)


def test_the_last_choices_typo_is_found_before_any_job_runs() -> None:
    assert "no recipe named 'quikstart'" in refusal("quickstart,quikstart", "seed=1,2")


def test_a_recipe_with_a_place_of_its_own_has_to_be_given_another(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(load_recipe("quickstart", ["output_dir=/fixed"]).to_yaml())
    assert "mine.yaml sets output_dir=/fixed itself" in refusal(str(file), "seed=1,2")
    sweep = expand(str(file), ["seed=1,2", "output_dir=here"])
    assert [str(job.directory) for job in sweep.jobs] == ["here/seed1", "here/seed2"]


def test_names_are_short_unique_and_safe() -> None:
    keys = ["objective", "objective.beta", "train.learning_rate", "dispersion.keep", "a.x", "b.x"]
    labels = labels_of(keys)
    assert list(labels.values()) == ["objective", "beta", "learning_rate", "keep", "a_x", "b_x"]
    row = dict(zip(keys, ["mallows_phi", 0.1 + 0.2, 1e-5, "[0,0.5]", None, True], strict=True))
    other = {**row, "dispersion.keep": "[0 0.5]"}
    longer = {**row, "objective": "very_" * 30}
    names = job_names([row, other, longer], labels)
    stem = "mallows_phi-beta0.3-learning_rate1e-5-keep0_0.5-a_xnull-b_xtrue"
    # Two that look the same have a digest of their values behind them.
    assert names[0].startswith(f"{stem}-")
    assert names[1].startswith(f"{stem}-")
    assert len(set(names)) == 3
    assert max(map(len, names)) < 120
    assert names == job_names([row, other, longer], labels)
    assert job_names([row], labels) == [stem]


@pytest.mark.parametrize("text", ["../../etc", "a/b", "", ".hidden", "a b\n", "#", "é", "x" * 5])
def test_a_safe_text_is_one_file_name(text: str) -> None:
    kept = safe(text)
    assert kept
    assert not set(kept) - set("abcdefghijklmnopqrstuvwxyz_-0123456789")
    assert Path("runs", kept).parent == Path("runs")


def test_expanding_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expand("quickstart", ["seed=1,2"])
    assert list(tmp_path.iterdir()) == []
