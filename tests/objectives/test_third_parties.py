"""Objectives of another installed package: found by their entry point, or one clear error."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.objectives import registered
from mallowspo_cli.objectives.third_parties import import_third_parties

ROOT = Path(__file__).parent.parent.parent

LOSS = '''
"""A loss of another package."""

from dataclasses import dataclass

from torch import Tensor

from mallowspo_cli.objectives import PairScores, register
from mallowspo_cli.objectives.baseline import RewardLoss


@register("exponential")
@dataclass(kw_only=True)
class Exponential(RewardLoss):
    """exp(-sharpness (r_w - r_l)), after nobody (arXiv 1234.56789)."""

    sharpness: float = 2.5
    """What the margin is multiplied by; raise it to boost."""

    def losses(self, chosen: Tensor, rejected: Tensor, policy: PairScores) -> Tensor:
        return (-self.sharpness * (chosen - rejected)).exp()
'''

# What a user does, one after another in one process: importing torch takes seconds.
DRIVER = """
import contextlib, io, json, runpy, sys
from mallowspo_cli.__main__ import main

def printed(run, *words):
    sys.argv, out = list(words), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        run()
    return out.getvalue()

script = sys.argv[1]
print(json.dumps({
    "list": printed(main, "mallowspo", "recipes", "list"),
    "keys": printed(main, "mallowspo", "recipes", "keys", "objective.sharpness"),
    "show": printed(
        main, "mallowspo", "recipes", "show", "quickstart",
        "objective=exponential", "objective.dispersion=true", "objective.sharpness=4",
    ),
    "sweep": printed(
        main, "mallowspo", "sweep", "recipe=quickstart", "objective=dpo,exponential",
        "objective.beta=0.1,0.2", "--launch", "print",
    ),
    "table": printed(lambda: runpy.run_path(script, run_name="__main__"), script, "--stdout"),
}))
"""


def package(site: Path, module: str, code: str | None) -> None:
    """An installed package `boosting` in a directory, with or without the module that it names."""
    about = site / "boosting-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: boosting\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[mallowspo.objectives]\nmine = {module}\n")
    if code is not None:
        (site / f"{module}.py").write_text(code)


@pytest.fixture
def searched_again() -> Iterator[None]:
    """Packages are looked for once in a process; here, and once more after the test."""
    import_third_parties.cache_clear()
    yield
    import_third_parties.cache_clear()


def test_a_loss_of_another_package_is_listed_explained_composed_swept_and_in_the_table(
    tmp_path: Path,
) -> None:
    package(tmp_path / "site", "boosting_losses", LOSS)
    script = str(ROOT / "scripts" / "write_objectives_table.py")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, script],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    printed = json.loads(done.stdout)
    (listed,) = (line for line in printed["list"].splitlines() if " exponential " in line)
    assert "exp(-sharpness (r_w - r_l))" in listed
    assert "(exponential) What the margin is multiplied by; raise it to boost." in printed["keys"]
    assert "- objective: exponential\n" in printed["show"]
    assert "dispersion: true\n" in printed["show"]
    assert "sharpness: 4.0\n" in printed["show"]
    swept = [line for line in printed["sweep"].splitlines() if "objective=exponential" in line]
    assert len(swept) == 2
    assert all("mallowspo" in line and "objective.beta=0." in line for line in swept)
    (row,) = (line for line in printed["table"].splitlines() if "`exponential`" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "`exponential`",
        "exp(-sharpness (r_w - r_l)), after nobody (arXiv 1234.56789)",
        "`beta` 0.1, `length_normalised` false, `dispersion` false, `sharpness` 2.5",
        "reference",
        "`dispersion=true`",
        "[1234.56789](https://arxiv.org/abs/1234.56789)",
    ]


@pytest.mark.usefixtures("searched_again")
@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (None, r"ModuleNotFoundError: No module named 'boosting_broken'"),
        ("raise OSError('no\\n licence')", r"OSError: no licence"),
        (LOSS.replace('"exponential"', '"dpo"'), r"RecipeError: the objective name 'dpo' is taken"),
    ],
)
def test_a_package_whose_module_cannot_be_imported_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str | None, cause: str
) -> None:
    package(tmp_path, "boosting_broken", code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RecipeError, match=cause) as caught:
        registered()
    message = str(caught.value)
    assert message.startswith("boosting offers objectives, but its module boosting_broken")
    assert message.endswith("Mend boosting, or uninstall it.")
    assert "\n" not in message
