"""model/README.md: what the model is and how it was made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from mallowspo_cli.report.run_report import result_rows

CARD = """\
---
library_name: {{ library }}
pipeline_tag: text-generation
tags: [preference-optimization, mallowspo, {{ results.objective }}]
{% if base -%}
base_model: {{ base }}
{% endif -%}
---
# {{ results.name }}

{{ results.model_source }}, fine-tuned on preference pairs with `{{ results.objective }}` by
mallowspo {{ environment.versions.mallowspo }} (MallowsPO, arXiv 2405.14953).

- data: {{ results.dataset_path }}, {{ results.pairs_seen }} pairs in {{ results.steps }} steps
{% if dispersion -%}
- dispersion: {{ dispersion.mode }}, scale {{ dispersion.scale }}, mean w
  {{ "%.4f"|format(dispersion.weight_mean) }} over {{ dispersion.pairs }} training pairs
- reference store: fingerprint {{ dispersion.fingerprint }}
{% endif -%}
- trained on: {{ environment.device }}, torch {{ environment.versions.torch }}, transformers
  {{ environment.versions.transformers }}
{% for note in notes -%}
- {{ note }}
{% endfor %}
| | before | after |
| --- | ---: | ---: |
{% for name, before, after in rows -%}
| {{ name }} | {{ before }} | {{ after }} |
{% endfor %}
## Recipe

`mallowspo train recipe=FILE` repeats the run from this file:

```yaml
{{ recipe }}```
"""


def model_card(
    recipe_yaml: str,
    results: dict[str, Any],
    dispersion: dict[str, Any] | None,
    environment: dict[str, Any],
    notes: Sequence[str] = (),
    library: str = "transformers",
) -> str:
    """The Markdown text of a trained model's card.

    Args:
        recipe_yaml: the resolved recipe.
        results: the run's results.json.
        dispersion: the run's dispersion.json, None where the objective read none.
        environment: the run's environment.json.
        notes: what else is to be said, a line each.
        library: what loads it.
    """
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(CARD)
    return template.render(
        results=results,
        rows=result_rows(results),
        base=hub_id(results["model_source"]),
        dispersion=dispersion,
        environment=environment,
        recipe=recipe_yaml,
        notes=notes,
        library=library,
    )


def hub_id(source: str) -> str | None:
    """A model source that is a hub id, else None."""
    outside = ":" in source or source.startswith((".", "/", "~")) or Path(source).is_dir()
    return source if source.count("/") == 1 and not outside else None
