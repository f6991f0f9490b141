"""Recipes compose, round-trip, and what a user can get wrong becomes one useful line."""

import dataclasses
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.objectives import registered
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.ipo import IPO
from mallowspo_cli.objectives.mallows import MallowsPhi
from mallowspo_cli.recipe.choices import Precision
from mallowspo_cli.recipe.find import (
    GROUPS,
    find_recipe,
    option_files,
    option_names,
    recipe_files,
    shipped_recipes,
)
from mallowspo_cli.recipe.load import load_base, load_recipe
from mallowspo_cli.recipe.schema import Recipe

SHIPPED = sorted(p.stem for p in shipped_recipes().glob("*.yaml") if p.stem != "base")
FAMILIES = ("quickstart", "llama3_phi", "hh_pythia_sft")
"""One of each kind, for what would take minutes with all."""
PLAIN = (str, int, float, bool, type(None))
GOOD = """\
defaults:
  - base
  - model: tiny_random
  - dataset: quickstart_pairs
  - objective: dpo
  - _self_
name: mine
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """A function that writes a recipe file and returns its path."""

    def write_recipe(text: str, name: str = "mine.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write_recipe


def message(name: str, *overrides: str) -> str:
    """What loading is refused with, which has to be one line."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def leaves(value: Any) -> Iterator[Any]:
    """Every value in a tree of dataclasses, dictionaries and lists, containers left out."""
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if type(value) is dict:
        value = list(value.values())
    if type(value) is list:
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def missing_key(recipe: str, *overrides: str) -> str | None:
    """The key that a composition lacks, if that is all that is wrong with it."""
    try:
        load_recipe(recipe, list(overrides))
    except RecipeError as error:
        found = str(error)
    else:
        return None
    key, has_none, _ = found.partition(" has no value. Give one: ")
    assert has_none, found
    return key


def test_the_quickstart_is_shipped() -> None:
    assert set(FAMILIES) <= set(SHIPPED)
    assert set(SHIPPED) <= set(recipe_files())


@pytest.mark.parametrize("recipe", SHIPPED)
def test_every_shipped_recipe_composes(recipe: str) -> None:
    loaded = load_recipe(recipe)
    assert isinstance(loaded.recipe, Recipe)
    assert loaded.recipe.name == recipe
    assert loaded.recipe.output_dir == f"runs/{recipe}"


@pytest.mark.parametrize("objective", option_names("objective"))
@pytest.mark.parametrize("recipe", FAMILIES)
def test_every_shipped_recipe_composes_with_every_objective(recipe: str, objective: str) -> None:
    found = load_recipe(recipe, [f"objective={objective}"]).recipe.objective
    assert type(found) in registered().values()
    if objective in registered():
        assert found == registered()[objective]()


@pytest.mark.parametrize("group", ["model", "dataset"])
@pytest.mark.parametrize("recipe", ["quickstart"])
def test_every_shipped_option_composes_or_names_the_value_it_needs(recipe: str, group: str) -> None:
    for option, file in option_files(group).items():
        values = yaml.safe_load(file.read_text())
        mandatory = [key for key, value in values.items() if value == "???"]
        key = missing_key(recipe, f"{group}={option}")
        assert key == (f"{group}.{mandatory[0]}" if mandatory else None)
        given = [f"{group}.{name}=given" for name in mandatory]
        node = getattr(load_recipe(recipe, [f"{group}={option}", *given]).recipe, group)
        for name, value in values.items():
            wanted = "given" if value == "???" else value
            found = getattr(node, name)
            if name == "parts":
                assert found.keys() == wanted.keys()
                inner = [(found[part], keys) for part, keys in wanted.items()]
            else:
                inner = [(node, {name: wanted})]
            for owner, keys in inner:
                for key_name, expected in keys.items():
                    assert getattr(owner, key_name) == expected, f"{group}={option}: {key_name}"


@pytest.mark.parametrize("recipe", SHIPPED)
def test_no_shipped_recipe_sets_anything_under_objective(recipe: str) -> None:
    assert "objective" not in yaml.safe_load(find_recipe(recipe).read_text())


@pytest.mark.parametrize("recipe", SHIPPED)
def test_every_shipped_recipe_says_what_it_is_and_how_to_run_it(recipe: str) -> None:
    lines = find_recipe(recipe).read_text().splitlines()
    assert lines[0].startswith("# ")
    assert f"mallowspo train recipe={recipe}" in lines[1]


def test_the_keys_of_a_mixtures_part_can_be_changed_and_are_checked() -> None:
    words = ["dataset=hh_and_shp", "dataset.parts.hh.weight=3"]
    parts = load_recipe("quickstart", words).recipe.dataset.parts
    assert (parts["hh"].weight, parts["shp"].weight) == (3, 1)
    text = message("quickstart", "dataset=hh_and_shp", "dataset.parts.hh.wait=3")
    assert text.startswith("dataset.parts.hh.wait is not a key of dataset.parts.hh")
    assert "Did you mean dataset.parts.hh.weight?" in text


def test_a_data_set_has_a_path_or_parts() -> None:
    text = message("quickstart", "dataset=hh_and_shp", "dataset.path=x.jsonl")
    assert text == ("dataset takes either a path or parts: found both. Set dataset.path=null.")
    assert "found neither" in message("quickstart", "dataset.path=null")


def test_overrides_reach_the_dataclasses_with_their_types() -> None:
    words = ["train.epochs=3", "train.precision=fp32", "dispersion.scale=1", "name=x", "seed=7"]
    recipe = load_recipe("quickstart", words).recipe
    assert (recipe.train.epochs, recipe.seed, recipe.output_dir) == (3, 7, "runs/x")
    assert recipe.train.precision is Precision.fp32
    assert recipe.dispersion.scale == 1


@pytest.mark.parametrize(
    ("flags", "cuda", "expected"),
    [
        ("fpu avx2 avx512f", None, "fp32"),
        ("fpu avx2 avx512_bf16", None, "bf16"),
        ("fpu amx_bf16", None, "bf16"),
        ("fpu", True, "bf16"),
        ("fpu avx512_bf16", False, "fp32"),
    ],
)
def test_auto_precision_is_what_the_machine_computes_in_and_is_written_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, cuda: bool | None, expected: str
) -> None:
    honest = Path.read_text

    def read(path: Path, *args: object, **options: object) -> str:
        return (
            f"flags : {flags}" if str(path) == "/proc/cpuinfo" else honest(path, *args, **options)
        )

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda is not None)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: bool(cuda))
    loaded = load_recipe("quickstart", ["train.precision=auto"])
    assert loaded.recipe.train.precision.value == expected
    assert yaml.safe_load(loaded.to_yaml())["train"]["precision"] == expected
    (tmp_path / "again.yaml").write_text(loaded.to_yaml())
    assert load_recipe(str(tmp_path / "again.yaml")).recipe.train.precision.value == expected


def test_no_omegaconf_object_is_left_in_the_tree() -> None:
    loaded = load_recipe("quickstart", ["objective=mallows_phi", "model.lora.rank=4"])
    for value in leaves(loaded.recipe):
        assert isinstance(value, (*PLAIN, Enum))
        assert type(value).__module__.partition(".")[0] in ("builtins", "mallowspo_cli")
    assert all(type(value) in PLAIN for value in leaves(loaded.tree))


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str], write: Callable[..., str]) -> None:
    load_recipe("quickstart", ["objective=dpo"])
    message("quickstart", "objective.betta=1")
    message(write(GOOD.replace("tiny_random", "tiny_randm")))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["objective=mallows_phi", "objective.link=smooth", "objective.beta=1e-3"],
        ["objective=ipo", "dispersion.scale=0.29", "dispersion.mode=shuffled"],
        ["train.learning_rate=1e-5", "train.max_steps=5", "model.lora.rank=8", "eval.at_start=no"],
        ["name=1e10", "output_dir=/tmp/a b", 'dataset.path="pairs#1.jsonl"'],
    ],
)
def test_a_recipe_written_down_composes_to_the_same_recipe(
    write: Callable[..., str], overrides: list[str]
) -> None:
    loaded = load_recipe("quickstart", overrides)
    again = load_recipe(write(loaded.to_yaml()))
    assert again.recipe == loaded.recipe
    assert again.to_yaml() == loaded.to_yaml()


def test_a_recipe_is_found_by_path_with_the_options_beside_it(write: Callable[..., str]) -> None:
    write("defaults:\n  - dpo\n  - _self_\nbeta: 5\n", "here, and there/objective/tuned.yaml")
    path = write(GOOD, "here, and there/it's mine.yaml")
    assert load_recipe(path).recipe.objective == DPO()
    assert load_recipe(path, ["objective=tuned"]).recipe.objective == DPO(beta=5)


def test_a_users_directory_adds_recipes_and_options_and_its_own_recipe_wins(
    write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOWSPO_RECIPE_PATH", str(tmp_path))
    write(GOOD, "fresh.yaml")
    write(GOOD, "quickstart.yaml")
    write("defaults:\n  - ipo\n  - _self_\nbeta: 2\n", "objective/tuned.yaml")
    assert load_recipe("fresh").recipe.name == "mine"
    assert load_recipe("quickstart").recipe.name == "mine"
    assert load_recipe("fresh", ["objective=tuned"]).recipe.objective == IPO(beta=2)
    shipped = str(shipped_recipes() / "quickstart.yaml")
    assert load_recipe(shipped, ["objective=tuned"]).recipe.objective == IPO(beta=2)


def test_an_installed_package_brings_recipes_by_an_entry_point(
    write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(GOOD, "site/booster_recipes/from_a_package.yaml")
    write(
        "from pathlib import Path\nPLACE = Path(__file__).parent\n",
        "site/booster_recipes/__init__.py",
    )
    write(
        "Metadata-Version: 2.1\nName: booster\nVersion: 1.0\n",
        "site/booster-1.0.dist-info/METADATA",
    )
    write(
        "[mallowspo.recipes]\nmine = booster_recipes:PLACE\n",
        "site/booster-1.0.dist-info/entry_points.txt",
    )
    assert "from_a_package" not in recipe_files()
    with monkeypatch.context() as patched:
        patched.syspath_prepend(str(tmp_path / "site"))
        assert load_recipe("from_a_package").recipe.name == "mine"
    assert "from_a_package" not in recipe_files()


def test_an_option_of_ours_and_of_the_users_is_refused_where_ours_would_win(
    write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOWSPO_RECIPE_PATH", str(tmp_path))
    write("source: elsewhere\n", "model/tiny_random.yaml")
    assert "Rename yours" in message("quickstart", "model=tiny_random")
    assert load_recipe(write(GOOD)).recipe.model.source == "elsewhere"


def test_a_users_directory_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOWSPO_RECIPE_PATH", "/no/such/place")
    assert "/no/such/place" in message("quickstart")


def test_a_recipe_can_start_from_another(write: Callable[..., str]) -> None:
    child = (
        "defaults:\n  - quickstart\n  - override model: tiny_random\n  - _self_\n"
        "train:\n  epochs: 3\n"
    )
    recipe = load_recipe(write(child)).recipe
    assert (recipe.model.source, recipe.train.epochs) == ("random:llama", 3)
    assert (
        recipe.train.global_batch_size == load_recipe("quickstart").recipe.train.global_batch_size
    )


def test_a_recipe_without_a_file_takes_its_choices_from_the_overrides() -> None:
    words = ["model=tiny_random", "dataset=quickstart_pairs", "objective=dpo", "objective.beta=0.4"]
    assert load_base(words).recipe.objective == DPO(beta=0.4)
    with pytest.raises(RecipeError, match=r"^objective has no value\. Give one: objective=NAME$"):
        load_base(words[:2])
    with pytest.raises(RecipeError, match=r"^no objective named 'dpoo'"):
        load_base([*words[:2], "objective=dpoo"])


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("+foo=1", ["foo is not a key of a recipe", "(it has: name, "]),
        ("++foo=1", ["foo is not a key of a recipe"]),
        ("+objective.foo=1", ["objective.foo is not a key of MallowsPhi"]),
        ("objective.betta=1", ["MallowsPhi (it has: beta, ", "Did you mean objective.beta?"]),
        ("train.epocs=1", ["not a key of train", "Did you mean train.epochs?"]),
        ("trian.epochs=1", ["Did you mean train.epochs?"]),
        ("model.lora.rnk=1", ["not a key of model.lora", "Did you mean model.lora.rank?"]),
        ("train.beta=1", ["train.beta is not a key of train", "Did you mean objective.beta?"]),
        ("beta=1", ["beta is not a key of a recipe", "Did you mean objective.beta?"]),
        ("learning_rate=1", ["Did you mean train.learning_rate?"]),
        ("train={epoks: 2}", ["train.epoks is not a key", "Did you mean train.epochs?"]),
        ("seed.x=1", ["seed.x is not a key: seed is a single value"]),
        ("model.revision.x=1", ["model.revision is a single value"]),
        ("hydra.run.dir=x", ["hydra.run.dir is not a key"]),
        ("objective/beta=1", ["objective/beta is not a key"]),
    ],
)
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(
    override: str, parts: list[str]
) -> None:
    found = message("quickstart", override)
    for part in parts:
        assert part in found


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs=two", "integer"),
        ("train.epochs=1.5", "integer"),
        ("train.learning_rate=x", "float"),
        ("eval.at_end=maybe", "bool"),
    ],
)
def test_a_wrong_type_names_key_value_and_the_type(override: str, expected: str) -> None:
    assert message("quickstart", override) == (
        f"{override} has the wrong type or value (expected {expected})."
    )


@pytest.mark.parametrize(
    ("override", "choices"),
    [
        ("train.precision=fp16", "fp32, bf16, auto; nearest: bf16"),
        ("dispersion.mode=off", "estimated, constant, shuffled, inverse"),
        ("objective.link=x", "exact, smooth"),
    ],
)
def test_a_wrong_choice_lists_the_choices(override: str, choices: str) -> None:
    assert message("quickstart", override) == (
        f"{override} has the wrong type or value (choices: {choices})."
    )


@pytest.mark.parametrize("override", ["train.epochs=null", "train=5", "model.lora=null"])
def test_a_value_where_none_or_a_node_belongs_is_named(override: str) -> None:
    assert message("quickstart", override) == f"{override} has the wrong type or value."


@pytest.mark.parametrize(
    ("group", "typo", "meant"),
    [
        ("objective", "dpoo", "dpo"),
        ("objective", "mallows-phi", "mallows_phi"),
        ("model", "tinyrandom", "tiny_random"),
        ("dataset", "locl", "local"),
    ],
)
def test_an_unknown_option_gives_the_nearest_name_and_all_choices(
    group: str, typo: str, meant: str, write: Callable[..., str]
) -> None:
    expected = f"no {group} named '{typo}'. Did you mean '{meant}'? Choices: "
    found = message("quickstart", f"{group}={typo}")
    assert found.startswith(expected)
    assert all(name in found for name in option_names(group))
    chosen = {"objective": "dpo", "model": "tiny_random", "dataset": "quickstart_pairs"}[group]
    text = GOOD.replace(f"{group}: {chosen}", f"{group}: {typo}")
    assert message(write(text)).startswith(f"mine.yaml: {expected}")


@pytest.mark.parametrize("value", ["null", "5", "[dpo]", "[dpo,ipo]", ""])
@pytest.mark.parametrize("group", GROUPS)
def test_what_is_no_option_name_is_refused(group: str, value: str) -> None:
    assert message("quickstart", f"{group}={value}").startswith(f"no {group} named '")


def test_an_unknown_recipe_gives_the_nearest_name() -> None:
    assert message("quickstrat").startswith(
        "no recipe named 'quickstrat'. Did you mean 'quickstart'?"
    )
    assert message("base").startswith("no recipe named 'base'.")
    assert message("").startswith("no recipe named ''.")


def test_a_missing_file_is_named() -> None:
    assert message("./no/such.yaml").startswith("no recipe file at ./no/such.yaml.")


@pytest.mark.parametrize("override", ["train.epochs=1,2", "seed=range(1,3)", "objective=dpo,ipo"])
def test_a_sweep_is_refused(override: str) -> None:
    assert message("quickstart", override) == (
        f"'{override}' names several values; this command takes one. `mallowspo sweep` takes "
        "several."
    )


@pytest.mark.parametrize("override", ["~train", "~train.epochs", "~objective"])
def test_a_deletion_is_refused(override: str) -> None:
    assert message("quickstart", override).startswith(f"'{override}' takes a key away")


@pytest.mark.parametrize("override", ["dataset.path=a#b", "name", "", "a b=1", "name=a\nb"])
def test_a_word_that_is_no_override_gets_a_hint_on_quoting(override: str) -> None:
    assert "Quote a value that holds '#'" in message("quickstart", override)


def test_a_quoted_hash_is_taken() -> None:
    source = load_recipe("quickstart", ['model.source="pypi:a==1#b.gguf"']).recipe.model.source
    assert source == "pypi:a==1#b.gguf"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("output_dir=${foo}", "'foo' not found"),
        ("output_dir=${oc.env:NO_SUCH_VARIABLE}", "NO_SUCH_VARIABLE"),
        ("name=${name}", "Recursive interpolation"),
        ("train=${eval}", "EvalConfig"),
        ("dataset.path=???", "dataset.path has no value. Give one: dataset.path=..."),
        ("name=???", "name has no value. Give one: name=..."),
        ("+train.epochs=3", "train.epochs"),
        ("+model=tiny_random", "model"),
    ],
)
def test_what_cannot_be_resolved_is_one_line(override: str, part: str) -> None:
    assert part in message("quickstart", override)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (GOOD + "train: [1, 2\n", "is not valid YAML: line 9: "),
        (GOOD + "train:\n\tepochs: 2\n", "is not valid YAML: line 9: "),
        (GOOD + "name: again\n", "not valid YAML: line 8: found duplicate key name"),
        ("- a\n- b\n", "mine.yaml holds a list"),
        ("hello", "mine.yaml holds a str"),
        ("defaults: base\n", "defaults is not a list"),
        ("", "does not start from `base`"),
        ("name: x\n", "does not start from `base`"),
        (GOOD.replace("  - base\n", ""), "does not start from `base`"),
        (GOOD.replace("- base", "- bass"), "no recipe named 'bass'"),
        (GOOD.replace("  - _self_\n", ""), "must be `- _self_`"),
        (GOOD.replace("  - base\n", "  - _self_\n  - base\n").replace("dpo\n  - _self_", "dpo"),
         "must be `- _self_`"),
        ("defaults:\n  - mine\n", "leads back to itself"),
        (GOOD + "hydra:\n  verbose: true\n", "hydra is not a key"),
        (GOOD + "foo: 1\n", "foo is not a key of a recipe"),
        (GOOD + "train:\n  epoks: 1\n", "Did you mean train.epochs?"),
        (GOOD + "objective:\n  betta: 1\n", "not a key of DPO (it has: beta, "),
        (GOOD + "train:\n  epochs: two\n", "train.epochs=two has the wrong type"),
        (GOOD + "train:\n  precision: fp16\n", "(choices: fp32, bf16, auto; nearest: bf16)"),
        (GOOD + "train:\n  epochs: 0\n", "train.epochs=0 is out of range"),
        (GOOD + "train:\n", "train=None has the wrong type"),
        (GOOD + "train: [1]\n", "TrainConfig"),
        (GOOD + "? \n: 2\n", "key"),
        (GOOD.replace("name: mine\n", ""), "name has no value. Give one: name=..."),
        (GOOD.replace("  - objective: dpo\n", ""), "Give one: objective=NAME"),
        (GOOD.replace("  - model: tiny_random\n", ""), "model.source has no value"),
    ],
)  # fmt: skip
def test_a_recipe_file_that_cannot_be_used_is_one_line(
    write: Callable[..., str], text: str, part: str
) -> None:
    assert part in message(write(text))


def test_a_file_that_is_not_text_or_has_another_ending_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(GOOD.encode() + b"# caf\xe9\n")
    assert "is not valid YAML" in message(str(tmp_path / "latin.yaml"))
    (tmp_path / "mine.yml").write_text(GOOD)
    assert "name ends in .yaml" in message(str(tmp_path / "mine.yml"))
    (tmp_path / "directory.yaml").mkdir()
    assert "no recipe file at" in message(str(tmp_path / "directory.yaml"))


def test_a_recipe_that_sets_the_objectives_values_refuses_another_objective(
    write: Callable[..., str],
) -> None:
    path = write(GOOD + "objective:\n  beta: 9\n")
    assert load_recipe(path).recipe.objective == DPO(beta=9)
    assert load_recipe(path, ["objective.beta=3"]).recipe.objective == DPO(beta=3)
    found = message(path, "objective=ipo")
    assert found.startswith("mine.yaml sets objective.beta itself, so objective=ipo would run")
    child = write("defaults:\n  - mine\n  - _self_\n", "child.yaml")
    assert message(child, "objective=ipo") == found


def test_a_recipe_written_down_refuses_another_objective(write: Callable[..., str]) -> None:
    path = write(load_recipe("quickstart").to_yaml())
    assert "sets objective.beta itself" in message(path, "objective=dpo")


def test_a_tuned_variant_is_chosen_by_name() -> None:
    assert load_recipe("quickstart", ["objective=quickstart_phi"]).recipe.objective == MallowsPhi(
        beta=0.3
    )


def test_a_failed_load_leaves_nothing_behind_for_the_next() -> None:
    before = load_recipe("quickstart").recipe
    message("quickstart", "train.epochs=two")
    message("quickstart", "objective=dpoo")
    assert load_recipe("quickstart").recipe == before


@pytest.mark.parametrize(
    "text", ["a: b", "#1", "1e10", "0123", "null", "yes", "it's", "a\\b", " x "]
)
def test_a_recipe_written_down_keeps_texts_as_they_are(
    write: Callable[..., str], text: str
) -> None:
    loaded = load_recipe("quickstart")
    loaded.tree["dataset"]["revision"] = text
    assert load_recipe(write(loaded.to_yaml())).recipe.dataset.revision == text


@pytest.mark.parametrize("place", ["a b", "a,b", "a#b", "a'b", 'a"b', "a$b", "a=b", "a[b]", "ä"])
def test_a_recipe_loads_from_a_directory_of_any_name(write: Callable[..., str], place: str) -> None:
    assert load_recipe(write(GOOD, f"{place}/mine.v1.yaml")).recipe.name == "mine"
