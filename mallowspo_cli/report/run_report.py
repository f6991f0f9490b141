"""report.html: one file that shows a run without any other."""

import base64
import json
from pathlib import Path
from typing import Any

import jinja2

from mallowspo_cli.files import write_text
from mallowspo_cli.report.plots import draw_run
from mallowspo_cli.training.metrics import read_metrics

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ results.name }}: {{ results.objective }}</title>
<style>
  body { font: 15px/1.5 sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
  table { border-collapse: collapse; margin: 1rem 0 }
  th, td { padding: .25rem .9rem; border-bottom: 1px solid #ddd; text-align: left }
  td.number { text-align: right; font-variant-numeric: tabular-nums }
  pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px }
  .pictures { display: flex; flex-wrap: wrap; gap: 1rem }
  .pictures img { width: 30rem; max-width: 100% }
</style>
<h1>{{ results.name }}</h1>
<p>{{ results.objective }} on {{ results.pairs_seen }} pairs of {{ results.dataset_path }}
from {{ results.model_source }}: {{ results.steps }} steps,
{{ "%.0f"|format(results.training_seconds) }} s of training,
{{ "%.2f"|format(results.pairs_per_second) }} pairs/s,
{{ "%.1f"|format(results.peak_memory_gib) }} GiB at most.</p>
<table>
<tr><th></th><th>before</th><th>after</th></tr>
{% for name, before, after in rows -%}
<tr><td>{{ name }}</td><td class="number">{{ before }}</td><td class="number">{{ after }}</td></tr>
{% endfor -%}
</table>
<div class="pictures">
{% for name, data in pictures -%}
<img alt="{{ name }}" src="data:image/png;base64,{{ data }}">
{% endfor -%}
</div>
{% if dispersion -%}
<h2>Dispersion</h2>
<p>{{ dispersion.mode }}, scale {{ "%.4f"|format(dispersion.scale) }}: w(x) over
{{ dispersion.pairs }} training pairs has mean
{{ "%.3f"|format(dispersion.weight_mean) }}, from {{ "%.3f"|format(dispersion.weight_min) }} to
{{ "%.3f"|format(dispersion.weight_max) }}; {{ dispersion.clamped }} clamped,
{{ dispersion.empty }} without an entropy.</p>
{% endif -%}
<h2>Recipe</h2>
<pre>{{ recipe }}</pre>
<h2>Environment</h2>
<pre>{{ environment }}</pre>
</html>
"""


def write_report(directory: Path, results: dict[str, Any]) -> Path:
    """Draw the pictures of a run into plots/ and write its report.html; returns that path."""
    dispersion = _read_json(directory / "dispersion.json")
    pictures = draw_run(directory / "plots", read_metrics(directory / "metrics.jsonl"), dispersion)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(PAGE).render(
        results=results,
        rows=result_rows(results),
        pictures=[(p.stem, base64.b64encode(p.read_bytes()).decode()) for p in pictures],
        dispersion=dispersion,
        recipe=(directory / "recipe.yaml").read_text(encoding="utf-8"),
        environment=(directory / "environment.json").read_text(encoding="utf-8"),
    )
    write_text(directory / "report.html", page)
    return directory / "report.html"


def result_rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, before, after) of a run's outcome, as text; before and after are held-out values."""
    before, after = results["before"], results["after"]
    rows = [
        ("held-out accuracy", _accuracy(before), _accuracy(after)),
        _row("held-out margin", "eval/rewards/margins", before, after),
        _row("held-out loss", "eval/loss", before, after),
        _row("chosen log-prob fell", "eval/displacement", before, after),
    ]
    kl = results["kl"]
    if kl is not None:
        text = f"{kl['mean']:.2f} [{kl['low']:.2f}, {kl['high']:.2f}] nats"
        name = f"sequence KL, {kl['responses']} responses of <= {kl['max_tokens']} tokens"
        rows.append((name, "0", text))
    rows.append(("pairs/s", "", f"{results['pairs_per_second']:.2f}"))
    return rows


def _accuracy(line: dict[str, Any] | None) -> str:
    if line is None:
        return "-"
    low, high = line["eval/rewards/accuracies_low"], line["eval/rewards/accuracies_high"]
    return f"{line['eval/rewards/accuracies']:.3f} [{low:.3f}, {high:.3f}]"


def _row(
    name: str, key: str, before: dict[str, Any] | None, after: dict[str, Any] | None
) -> tuple[str, str, str]:
    texts = [
        "-" if line is None or line.get(key) is None else f"{line[key]:.3f}"
        for line in (before, after)
    ]
    return name, texts[0], texts[1]


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
