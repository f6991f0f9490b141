"""What to look at in the findings of a data check, one line each, with what to do."""

from mallowspo_cli.data.report import EQUAL_TEXT, EQUAL_TOKENS, Findings
from mallowspo_cli.data.tokenize import NO_BOUNDARY, NO_PAIR

LONG_SHARE = 0.05
"""Share of pairs lost to the length limits that is worth a warning."""


BIASED_SHARE = 0.65
"""Share of pairs with the same response longer that is worth a warning."""


ODDITIES = {
    "blank_turn": (
        "pairs with a turn without text in the prompt",
        "Check how the rows were made.",
    ),
    "role_name": ("pairs with a response that is only a role's name", "Take them out."),
    "special_token": (
        "pairs whose text spells a special token, which the model reads as that token",
        "Take the spelling out of the text.",
    ),
    "repeated_prompt": (
        "pairs whose responses both begin with the prompt's text, which is trained as response",
        "Take the prompt off the responses, or leave the prompt column out.",
    ),
}
"""What a pair with an oddity is, and what to do."""


def warnings(findings: Findings) -> list[str]:
    """What to look at, one line each, with what to do."""
    found = []
    for name, split in findings["splits"].items():
        lines = [
            *_about_losses(split, findings["limits"]["truncation"]),
            *_about_repeats(split),
            *_about_marks(split, findings["limits"]["truncation"]),
            *_about_oddities(split),
            *_about_bias(split),
        ]
        found += [f"{name}: {line}" for line in lines]
    overlap = findings["overlap"]
    if overlap and overlap["pairs"]:
        first = overlap["examples"][0]
        found.append(
            f"eval: pairs whose prompt is in the training split too: {overlap['pairs']:,} "
            f"({overlap['share']:.1%}; first: {first['eval']}, {first['train']}). Take them out, "
            "or hold whole prompts out: dataset.eval_split=null dataset.eval_size=N."
        )
    return found


def _about_losses(split: Findings, truncation: str) -> list[str]:
    found = []
    if not split["pairs"]:
        found.append(f"no pair is left; rows: {split['rows']:,}. The causes are listed above.")
    for cause, of_cause in split["losses"].items():
        count = of_cause["count"]
        first = of_cause["examples"][0] if of_cause["examples"] else {"where": "", "error": ""}
        if cause in (NO_PAIR, NO_BOUNDARY):
            error = str(first["error"]).rstrip(".")
            remedy = (
                "Mend them, or leave them out: dataset.on_error=drop."
                if split["pairs"]
                else "Is this the layout (dataset.format)?"
            )
            found.append(f"{cause}: {count:,} (first: {error}). {remedy}")
        elif cause in (EQUAL_TEXT, EQUAL_TOKENS):
            cut = cause == EQUAL_TOKENS and truncation == "keep_start"
            found.append(
                f"{cause}: {count:,} (first: {first['where']}). "
                + (
                    "They may differ further on: raise dataset.max_length."
                    if cut
                    else "Nothing can be learned from them: take them out of the data."
                )
            )
        elif " longer than " in cause and of_cause["share"] >= LONG_SHARE:
            found.append(
                f"{cause}: {count:,} ({of_cause['share']:.1%}). Raise the limit, or cut them: "
                "dataset.truncation=keep_end."
            )
    return found


def _about_repeats(split: Findings) -> list[str]:
    found, repeated, swapped = [], split["duplicates"], split["contradictions"]
    if count := repeated["distinct"]:
        rows = ", ".join(repeated["examples"][0])
        found.append(
            f"pairs that occur more than once: {count:,}, {repeated['pairs'] - count:,} too many "
            f"(first: {rows}). Keep one of each."
        )
    if count := swapped["distinct"]:
        rows = " and ".join(swapped["examples"][0])
        found.append(
            f"responses that stand both ways round under one prompt: {count:,} (first: {rows}). "
            "Decide for one label, or take them out."
        )
    return found


def _about_marks(split: Findings, truncation: str) -> list[str]:
    found, bos, end = [], split["bos"], split["end"]
    if bos and (count := bos["several"]["count"]):
        found.append(
            f"prompts that begin with more than one {bos['token']}: {count:,} (first: "
            f"{bos['several']['examples'][0]}). Give a chat template that writes one: "
            "model.chat_template=FILE."
        )
    if bos and bos["expected_at_start"] and (count := bos["none"]["count"]):
        found.append(
            f"prompts that begin without {bos['token']}: {count:,} (first: "
            f"{bos['none']['examples'][0]}). "
            + (
                "truncation=keep_end cuts it away: raise the length limits."
                if truncation == "keep_end"
                else "Give a chat template that writes it: model.chat_template=FILE."
            )
        )
    if bos and (count := bos["inside"]["count"]):
        found.append(
            f"pairs with {bos['token']} behind the beginning: {count:,} (first: "
            f"{bos['inside']['examples'][0]}). Take it out of the text or the chat template."
        )
    if count := end["missing"]:
        cut = truncation == "keep_start" and count < end["responses"]
        found.append(
            f"responses without an end token: {count:,} of {end['responses']:,} (first: "
            f"{end['examples'][0]}). "
            + (
                "They were cut, and teach the model not to stop: dataset.truncation=drop."
                if cut
                else f"Generation stops at {', '.join(end['tokens']) or 'nothing'}: give a chat "
                "template that writes it, or name the last token in generation_config.json."
            )
        )
    return found


def _about_oddities(split: Findings) -> list[str]:
    found = []
    for name, odd in split["oddities"].items():
        what, remedy = ODDITIES[name]
        if odd["count"]:
            found.append(f"{what}: {odd['count']:,} (first: {odd['examples'][0]}). {remedy}")
    return found


def _about_bias(split: Findings) -> list[str]:
    bias, pairs = split["length_bias"], split["pairs"]
    if bias is None:
        return []
    longer = max(("chosen", "rejected"), key=lambda name: bias[f"{name}_longer"])
    share = bias[f"{longer}_longer"]
    # Three standard errors of a fair coin: a few pairs show no bias.
    if share < max(BIASED_SHARE, 0.5 + 1.5 / pairs**0.5):
        return []
    return [
        f"the {longer} response is the longer one in {share:.0%} of the pairs (chosen - rejected: "
        f"{bias['mean_difference']:+.1f} tokens on average), so that length may be what is "
        "learned. Compare with objective=simpo, whose reward is a mean over tokens."
    ]
