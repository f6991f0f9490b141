"""What a dispersion index does to a data set: numbers, pictures and the prompts at both ends."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from mallowspo_cli.evaluation.statistics import Correlation, spearman
from mallowspo_cli.files import write_json, write_text
from mallowspo_cli.report.pictures import HELD_OUT, TRAIN, save_picture

Values = NDArray[np.float64]
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
LENGTH_BANDS = 5
TAIL_PROMPTS = 10
"""Prompts shown from each end."""


@dataclass(frozen=True)
class WeighedPairs:
    """N training pairs with their weights; all arrays (N,)."""

    weights: Values
    """w as the objective sees it."""
    prompt_keys: NDArray[np.int64]
    parts: list[str]
    """Which data set of a mixture each pair is of."""
    prompt_tokens: Values
    chosen_tokens: Values
    rejected_tokens: Values
    reference_margin: Values
    """The reference's summed log-prob of chosen minus rejected, in nats."""
    rater_neg_log_phi: Values
    """-log phi by the raters' scores; NaN without raters."""


def describe(pairs: WeighedPairs, beta: float | None) -> dict[str, Any]:
    """Everything that the report says in numbers, as plain values."""
    weights, known = pairs.weights, pairs.weights[~np.isnan(pairs.weights)]
    counts, edges = np.histogram(known, bins=60)
    return {
        "weight": _summary(weights),
        "share_outside_half_to_two": float(((known < 0.5) | (known > 2)).mean()),
        "effective_beta": _summary(beta * weights) if beta is not None else None,
        "beta": beta,
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "by_source": {
            name or "all": _summary(weights[np.asarray(pairs.parts) == name])
            for name in dict.fromkeys(pairs.parts)
        },
        "by_response_length": _by_length(pairs),
        "correlations": {
            name: asdict(value) | {"what": what}
            for name, (what, value) in _relations(pairs).items()
        },
    }


def _summary(values: Values) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    found = np.quantile(known, QUANTILES).tolist() if len(known) else [None] * len(QUANTILES)
    return {
        "pairs": len(values),
        "mean": float(known.mean()) if len(known) else None,
        "sd": float(known.std()) if len(known) else None,
        "quantiles": {str(q): value for q, value in zip(QUANTILES, found, strict=True)},
    }


def _by_length(pairs: WeighedPairs) -> list[dict[str, Any]]:
    """Bands of as many pairs each, by the tokens of both responses together."""
    length = pairs.chosen_tokens + pairs.rejected_tokens
    order = np.argsort(length, kind="stable")
    return [
        {
            "tokens_from": int(length[band].min()),
            "tokens_to": int(length[band].max()),
            **_summary(pairs.weights[band]),
        }
        for band in np.array_split(order, min(LENGTH_BANDS, len(order)))
    ]


def _relations(pairs: WeighedPairs) -> dict[str, tuple[str, Correlation]]:
    """Rank correlations of w, with intervals over prompts."""
    others = {
        "response_tokens": (
            "tokens of both responses",
            pairs.chosen_tokens + pairs.rejected_tokens,
        ),
        "prompt_tokens": ("tokens of the prompt", pairs.prompt_tokens),
        "length_difference": (
            "tokens of chosen minus rejected",
            pairs.chosen_tokens - pairs.rejected_tokens,
        ),
        "reference_margin": (
            "the reference's log-prob of chosen minus rejected",
            pairs.reference_margin,
        ),
    }
    if not np.isnan(pairs.rater_neg_log_phi).all():
        others["rater_agreement"] = ("-log phi by the raters", pairs.rater_neg_log_phi)
    groups = pairs.prompt_keys.tolist()
    return {
        name: (what, spearman(pairs.weights, values, groups))
        for name, (what, values) in others.items()
    }


def tails(pairs: WeighedPairs, count: int = TAIL_PROMPTS) -> tuple[list[int], list[int]]:
    """Indices of pairs of the least and of the most dispersed prompts, each prompt once."""
    order = np.argsort(-pairs.weights, kind="stable")
    order = order[~np.isnan(pairs.weights[order])]

    def first_of_each(indices: Sequence[int]) -> list[int]:
        chosen: dict[int, int] = {}
        for index in indices:
            chosen.setdefault(int(pairs.prompt_keys[index]), int(index))
            if len(chosen) == count:
                break
        return list(chosen.values())

    return first_of_each(order.tolist()), first_of_each(order[::-1].tolist())


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Dispersion of {{ name }}</title>
<style>
  body { font: 15px/1.5 sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
  table { border-collapse: collapse; margin: 1rem 0 }
  th, td { padding: .25rem .9rem; border-bottom: 1px solid #ddd; text-align: left;
           vertical-align: top }
  td.number { text-align: right; font-variant-numeric: tabular-nums }
  td.text { white-space: pre-wrap; font-size: 13px }
  .pictures { display: flex; flex-wrap: wrap; gap: 1rem }
  .pictures img { width: 30rem; max-width: 100% }
</style>
<h1>Dispersion of {{ name }}</h1>
<p>{{ data.weight.pairs }} training pairs. {{ how }} A high w is a low dispersion: there a
preference counts more. w = 1 is DPO's weight.</p>
<table>
<tr><th></th><th>mean</th>
{%- for q in quantiles %}<th>{{ "%g"|format(100 * q) }} %</th>{% endfor %}</tr>
{% for label, row in rows -%}
<tr><td>{{ label }}</td><td class="number">{{ number(row.mean) }}</td>
{%- for value in row.quantiles.values() -%}
<td class="number">{{ number(value) }}</td>{% endfor %}</tr>
{% endfor -%}
</table>
<p>{{ "%.1f"|format(100 * data.share_outside_half_to_two) }} % of the pairs have a w outside
[1/2, 2].</p>
<div class="pictures">
{% for label, picture in pictures -%}
<img alt="{{ label }}" src="data:image/png;base64,{{ picture }}">
{% endfor -%}
</div>
<h2>What goes with w</h2>
<table>
<tr><th>rank correlation of w with</th><th>Spearman</th><th>95 % interval, by prompts</th>
<th>pairs</th></tr>
{% for row in data.correlations.values() -%}
<tr><td>{{ row.what }}</td><td class="number">{{ number(row.value) }}</td>
<td class="number">{{ number(row.low) }} to {{ number(row.high) }}</td>
<td class="number">{{ row.pairs }}</td></tr>
{% endfor -%}
</table>
{% for heading, tail in tails -%}
<h2>{{ heading }}</h2>
<table>
<tr><th>w</th><th>prompt</th><th>chosen</th><th>rejected</th></tr>
{% for row in tail -%}
<tr><td class="number">{{ number(row.w) }}</td><td class="text">{{ row.prompt }}</td>
<td class="text">{{ row.chosen }}</td><td class="text">{{ row.rejected }}</td></tr>
{% endfor -%}
</table>
{% endfor -%}
</html>
"""


def write_dispersion_report(
    directory: Path,
    name: str,
    how: str,
    data: dict[str, Any],
    pairs: WeighedPairs,
    ends: dict[str, list[dict[str, Any]]],
) -> None:
    """Write dispersion.json, plots and report.html into `directory`.

    Args:
        how: one sentence on where w comes from.
        data: what `describe` gave.
        ends: the least and the most dispersed prompts with their texts, by heading.
    """
    (directory / "plots").mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Axes], None]] = {
        "weights": lambda axes: _histogram(axes, data),
        "length": lambda axes: _against_length(axes, pairs),
    }
    files = [save_picture(draw, directory / "plots" / f"{n}.png") for n, draw in pictures.items()]
    rows = [("w", data["weight"])]
    if data["effective_beta"] is not None:
        rows.append((f"beta w (beta = {data['beta']:g})", data["effective_beta"]))
    if len(data["by_source"]) > 1:
        rows += [(f"w, {source}", row) for source, row in data["by_source"].items()]
    rows += [
        (f"w, responses of {band['tokens_from']} to {band['tokens_to']} tokens", band)
        for band in data["by_response_length"]
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals["number"] = _number
    page = environment.from_string(PAGE).render(
        name=name,
        how=how,
        data=data,
        rows=rows,
        quantiles=QUANTILES,
        pictures=[(f.stem, base64.b64encode(f.read_bytes()).decode()) for f in files],
        tails=list(ends.items()),
    )
    write_json(directory / "dispersion.json", {**data, "how": how, "prompts": ends})
    write_text(directory / "report.html", page)


def _number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.3f}"


def _histogram(axes: Axes, data: dict[str, Any]) -> None:
    axes.stairs(data["histogram"]["counts"], data["histogram"]["edges"], fill=True, color=TRAIN)
    axes.axvline(1.0, color="grey", linestyle=":", label="w = 1 (DPO's weight)")
    for edge in (0.5, 2.0):
        axes.axvline(edge, color=HELD_OUT, linestyle=":", linewidth=1)
    axes.set_xlabel("w(x) = -2 log phi(x); low dispersion to the right")
    axes.set_ylabel("training pairs")
    axes.legend(frameon=False)


def _against_length(axes: Axes, pairs: WeighedPairs) -> None:
    length = pairs.chosen_tokens + pairs.rejected_tokens
    # Thousands of points say no more than some, and make a large file.
    some = np.unique(np.linspace(0, len(length) - 1, 2000).astype(int))
    axes.scatter(length[some], pairs.weights[some], s=4, alpha=0.4, color=TRAIN, linewidths=0)
    axes.set_xscale("log")
    axes.set_xlabel("tokens of both responses")
    axes.set_ylabel("w(x)")
