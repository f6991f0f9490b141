"""Record what alpaca_eval's own length control says of made-up judgements.

    python scripts/record_length_control.py tests/golden/length_control.json

tests/evaluation/test_length_control.py holds ours against it. The data are drawn here from a known
model; the figures come from the installed alpaca_eval, with its download replaced by a local file.
"""

import argparse
import importlib.metadata
import json
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import packaging.version

sys.path.insert(0, str(Path(__file__).parent.parent))

from mallowspo_cli.files import write_text

PACKAGES = ("alpaca_eval", "scikit-learn", "pandas", "patsy", "numpy")
VARIANTS = ("length_controlled_v1", "length_controlled_noreg", "length_controlled_minimal")
GAMED_COLUMNS = ("index", "preference", "std_delta_len", "instruction_difficulty")


def main() -> None:
    """Draw the data, ask alpaca_eval, write the file with one line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="the JSON file to write")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases; all of them otherwise")
    options = parser.parse_args()
    generator = np.random.default_rng(7)
    sizes = {"few": 24, "small": 120, "official size": 805}
    sets = {name: instructions(generator, size) for name, size in sizes.items()}
    cases = [
        {**case, "figures": upstream_figures(case, sets[case["set"]])}
        for case in judgements(generator, sets)
        if options.only is None or case["name"] in options.only
    ]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    write_text(options.target, _lines({"versions": versions, "sets": sets, "cases": cases}))
    print(options.target)


def instructions(generator: np.random.Generator, number: int) -> dict[str, Any]:
    """Difficulties of so many instructions, and judgements of a long- and a short-winded twin."""
    difficulty = generator.normal(0.2, 0.8, number).round(3)
    gamed = []
    for style, lean in (("verbose", -1.2), ("concise", 1.3)):
        delta = generator.normal(lean, 0.6, number).round(3)
        share = _share(generator, 0.1 * difficulty - 0.9 * np.tanh(delta), spread=1.2)
        columns = (range(number), share.tolist(), delta.tolist(), difficulty.tolist())
        gamed += [[style, *row] for row in zip(*columns, strict=True)]
    return {"difficulty": difficulty.tolist(), "gamed": gamed}


def judgements(generator: np.random.Generator, sets: dict[str, Any]) -> list[dict[str, Any]]:
    """Cases: lengths in characters, and preferences in [1, 2], None where the judge failed."""

    def case(
        name: str,
        skill: float,
        length: float,
        *,
        spread: float = 1.5,
        longer: float = 1.0,
        kind: str = "soft",
        among: str = "small",
    ) -> dict[str, Any]:
        difficulty = np.asarray(sets[among]["difficulty"])
        baseline = generator.lognormal(7.2, 0.6, len(difficulty)).astype(int) + 1
        model = (baseline * longer * generator.lognormal(0, 0.5, len(difficulty))).astype(int) + 1
        delta = (baseline - model) / np.std(baseline - model, ddof=1)
        share = _share(generator, skill + 0.5 * difficulty + length * np.tanh(delta), spread)
        if kind in ("hard", "wins", "losses"):
            share = (share > {"hard": 0.5, "wins": -1, "losses": 2}[kind]).astype(float)
        draws = generator.random(len(share)) < (0.1 if kind == "hard" else 0.0)
        failed = generator.random(len(share)) < (0.15 if kind == "failed" else 0.0)
        chosen = np.where(draws, 1.5, 1 + share).round(4).tolist()
        preference = [None if lost else value for lost, value in zip(failed, chosen, strict=True)]
        return {
            "name": name,
            "set": among,
            "preference": preference,
            "baseline_lengths": baseline.tolist(),
            "model_lengths": model.tolist(),
        }

    return [
        case("soft", 0.3, -0.5),
        case("hard with draws", -0.4, -0.5, kind="hard"),
        case("failed judgements", -0.2, -0.5, kind="failed"),
        case("length decides", -0.6, -2.5, longer=2.0),
        case("close to chance", 0.02, 0.0, spread=0.05),
        case("few judgements", 0.1, -0.3, among="few"),
        case("every judgement a win", 0.0, 0.0, kind="wins"),
        case("every judgement a loss", 0.0, 0.0, kind="losses"),
        case("official size", -1.2, -0.9, spread=2.5, longer=1.3, among="official size"),
    ]


def _share(generator: np.random.Generator, logits: np.ndarray, spread: float) -> np.ndarray:
    noisy = logits + generator.normal(0, spread, len(logits))
    return (1 / (1 + np.exp(-noisy))).round(4)


def upstream_figures(case: dict[str, Any], drawn: dict[str, Any]) -> dict[str, Any]:
    """alpaca_eval's metrics, coefficients, C and predictions of each variant."""
    with warnings.catch_warnings():
        # It uses what scikit-learn calls deprecated.
        warnings.simplefilter("ignore")
        _stand_in_for_pkg_resources()
        import sklearn
        from alpaca_eval.metrics import glm_winrate

        figures = {}
        with tempfile.TemporaryDirectory() as place, sklearn.config_context():
            file = Path(place) / "gamed.csv"
            write_gamed(file, drawn["gamed"])
            for variant in VARIANTS:
                figures[variant] = _ask(glm_winrate, variant, annotations_of(case), file)
    return figures


def _stand_in_for_pkg_resources() -> None:
    """alpaca_eval 0.6.6 imports a module that setuptools has dropped, for two functions."""
    module = types.ModuleType("pkg_resources")
    module.__dict__["parse_version"] = packaging.version.parse
    sys.modules.setdefault("pkg_resources", module)


def write_gamed(file: Path, rows: list[list[Any]]) -> None:
    """A file in the form of AlpacaEval's df_gamed.csv."""
    head = ",".join(("model", *GAMED_COLUMNS, "not_gamed_baseline"))
    lines = [",".join([*(str(value) for value in row), "False"]) for row in rows]
    file.write_text("\n".join([head, *lines]) + "\n")


def annotations_of(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an annotations.json; only the lengths of the answers matter."""
    return [
        {
            "instruction": f"instruction {row}",
            "output_1": "x" * baseline,
            "generator_1": "baseline",
            "output_2": "x" * model,
            "generator_2": "model",
            "annotator": "made up",
            "preference": preference,
        }
        for row, (preference, baseline, model) in enumerate(
            zip(case["preference"], case["baseline_lengths"], case["model_lengths"], strict=True)
        )
    ]


def _ask(glm_winrate: Any, variant: str, rows: list[dict[str, Any]], file: Path) -> dict[str, Any]:
    import pandas

    fit, fitted = glm_winrate.fit_LogisticRegressionCV, []

    def kept(*arguments: Any, **options: Any) -> Any:
        fitted.append(fit(*arguments, **options))
        return fitted[-1]

    annotations = pandas.DataFrame(rows)
    with (
        mock.patch.object(glm_winrate, "hf_hub_download", return_value=str(file)),
        mock.patch.object(glm_winrate, "fit_LogisticRegressionCV", kept),
    ):
        metrics = glm_winrate.get_length_controlled_winrate(
            annotations, variant, save_weights_dir=None, is_warn_extreme_changes=False
        )
    (model,) = fitted
    names = [str(name) for name in model.feature_names_in_]
    return {
        "metrics": {key: float(value) for key, value in metrics.items()},
        "coefficients": dict(zip(names, model.coef_[0].tolist(), strict=True)),
        "c": float(model.C_[0]),
        "predictions": annotations["glm_preference"].tolist()[:5],
    }


def _lines(record: dict[str, Any]) -> str:
    """JSON with a line for each set and each case, so that a change shows where it is."""

    def compact(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)

    sets = ",\n".join(f"{compact(name)}:{compact(drawn)}" for name, drawn in record["sets"].items())
    cases = ",\n".join(map(compact, record["cases"]))
    versions = compact(record["versions"])
    return f'{{"versions":{versions},\n"sets":{{\n{sets}}},\n"cases":[\n{cases}]}}\n'


if __name__ == "__main__":
    main()
