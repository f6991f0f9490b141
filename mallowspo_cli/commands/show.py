"""What the verbs print on stdout."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.data.tokenize import TokenizedPair
from mallowspo_cli.report.run_report import result_rows


def print_results(results: dict[str, Any]) -> None:
    """The table at the end of a run, and where things lie."""
    title = f"{results['name']}: {results['objective']}, {results['pairs_seen']} pairs"
    table = Table(title=Text(title))
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for row in result_rows(results):
        table.add_row(*row)
    out = Console(highlight=False, markup=False)
    out.print(table)
    out.print(f"model:  {results['model']}", soft_wrap=True)
    out.print(f"report: {results['report']}", soft_wrap=True)


def print_preferences(results: dict[str, Any]) -> None:
    """The table of a held-out evaluation."""
    table = Table(title=Text(f"{results['model']} on {results['pairs']} held-out pairs"))
    table.add_column("")
    table.add_column("value", justify="right")
    low, high = results["accuracy_low"], results["accuracy_high"]
    table.add_row("accuracy", f"{results['accuracy']:.3f} [{low:.3f}, {high:.3f}]")
    for name in ("loss", "margin", "chosen_reward", "rejected_reward"):
        table.add_row(name.replace("_", " "), f"{results[name]:.3f}")
    if results["displacement"] is not None:
        table.add_row("chosen log-prob fell (share)", f"{results['displacement']:.3f}")
    for tercile, values in results["by_dispersion"].items():
        table.add_row(
            f"{tercile.replace('_', ' ')} (w = {values['weight_mean']:.2f})",
            f"accuracy {values['accuracy']:.3f}, margin {values['margin']:.3f}",
        )
    Console(highlight=False, markup=False).print(table)


def print_pair(
    pair: TokenizedPair,
    tokenizer: PreTrainedTokenizerBase,
    where: str | None = None,
    ids: bool = False,
) -> None:
    """A pair as the model sees it: the prompt dim, what is trained in colour.

    Args:
        where: the pair's place in the data, to stand above it.
        ids: one token after another, as `"text":id`, with `␣` for a space.
    """
    out = Console(highlight=False, markup=False)
    if where is not None:
        out.print(where, soft_wrap=True)
    styles = {"prompt": "dim", "chosen": "green", "rejected": "red"}
    for part, style in styles.items():
        tokens = getattr(pair, part).tolist()
        out.print(f"{part}: ({'not trained' if part == 'prompt' else 'trained'})", style="bold")
        if ids:
            out.print(_token_by_token(tokens, tokenizer, style))
        else:
            text = str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
            out.print(Text(text, style=style), soft_wrap=True)
    out.print(
        f"tokens: prompt {len(pair.prompt)}, chosen {len(pair.chosen)}, "
        f"rejected {len(pair.rejected)}; id {pair.pair_id}"
    )


def _token_by_token(tokens: list[int], tokenizer: PreTrainedTokenizerBase, style: str) -> Text:
    line = Text()
    for token in tokens:
        text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
        if "\ufffd" in text:
            # A part of a character has no text of its own.
            text = str(tokenizer.convert_ids_to_tokens(token))
        line.append(json.dumps(text, ensure_ascii=False).replace(" ", "␣"), style=style)
        line.append(f":{token}", style="dim")
        line.append("  ")
    return line
