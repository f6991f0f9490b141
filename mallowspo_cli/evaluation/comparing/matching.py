"""Which evaluations of several sides belong together."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mallowspo_cli.evaluation.comparing.sides import Evaluation, Found, Member, Ranked, Side

F = TypeVar("F", bound=Found)

SAMPLING = ("temperature", "top_p", "top_k", "max_tokens")
"""Settings of generations.jsonl that are worth a note where they differ."""
JUDGING = ("digest", "judge", "engine", "swap")
"""Settings of judgements.jsonl that have to be equal; digest: of the judge's prompt and parser."""
UNNAMED = "unknown"
"""The judge of an annotations.json that names none."""


@dataclass(frozen=True)
class Match(Generic[F]):
    """The same evaluation of several sides."""

    title: str
    of: dict[int, dict[str, F]]
    """By number of the side and name of the member."""


def matched_evaluations(
    sides: Sequence[Side], notes: list[str]
) -> list[tuple[str, str, Match[Evaluation]]]:
    """(judge, baseline, match) of all that at least two sides have; the rest goes to `notes`."""
    found = _matched(
        sides, lambda member: member.evaluations, lambda one: (one.judge, one.baseline), notes
    )
    return [(key[0], key[1], match) for key, match in found]


def matched_rankings(sides: Sequence[Side], notes: list[str]) -> list[Match[Ranked]]:
    """Held-out pairs that at least two sides have ranked; the rest goes to `notes`."""
    found = _matched(sides, lambda member: member.rankings, lambda _: ("held-out pairs",), notes)
    return [match for _, match in found]


def _matched(
    sides: Sequence[Side],
    of_member: Callable[[Member], Sequence[F]],
    key_of: Callable[[F], tuple[str, ...]],
    notes: list[str],
) -> list[tuple[tuple[str, ...], Match[F]]]:
    """Groups by key, and by name where a member has several of one key."""
    places = [
        (key_of(found), index, member.name, found)
        for index, side in enumerate(sides)
        for member in side.members
        for found in of_member(member)
    ]
    result: list[tuple[tuple[str, ...], Match[F]]] = []
    for key in dict.fromkeys(place[0] for place in places):
        inside = [place[1:] for place in places if place[0] == key]
        names = {found.name for _, _, found in inside if found.one_of_several}
        owners = {(index, member) for index, member, _ in inside}
        split = len(names) > 1 or len(owners) < len(inside)
        groups: dict[Hashable, list[tuple[int, str, F]]] = {}
        for place in inside:
            groups.setdefault(place[2].name if split else None, []).append(place)
        matches = [_match(sides, group, " / ".join(key), notes) for group in groups.values()]
        result += [(key, match) for match in matches if match]
    return result


def _match(
    sides: Sequence[Side], group: list[tuple[int, str, F]], what: str, notes: list[str]
) -> Match[F] | None:
    of: dict[int, dict[str, F]] = {}
    for index, member, found in group:
        of.setdefault(index, {})[member] = found
    names = {found.name for _, _, found in group}
    title = names.pop() or "" if len(names) == 1 else ""
    told = f"{title or 'an evaluation'} ({what})"
    if len(of) < 2:
        (index,) = of
        notes.append(f"{told} is there for {sides[index].label} alone, so it is not compared.")
        return None
    for index, members in of.items():
        if lacking := [m.name for m in sides[index].members if m.name not in members]:
            notes.append(f"{told} is missing for {', '.join(lacking)} of {sides[index].label}.")
    return Match(title, of)


def differing(evaluations: Sequence[Evaluation], keys: Sequence[str], which: str) -> str | None:
    """Names and values of settings that differ where they are known, in one line.

    Args:
        which: the field of an evaluation that holds them.
    """
    told = []
    for key in keys:
        known = [str(s[key]) for e in evaluations if key in (s := getattr(e, which))]
        if len(set(known)) > 1:
            told.append(f"{key} {' and '.join(dict.fromkeys(known))}")
    return "; ".join(told) or None


def unchecked_judge(evaluations: Sequence[Evaluation]) -> str | None:
    """Why it cannot be told whether all were judged alike; None where it can."""
    if any(evaluation.judge == UNNAMED for evaluation in evaluations):
        return "an annotations.json names no annotator"
    without = [e.place.parent for e in evaluations if not e.settings]
    if without and len(without) < len(evaluations):
        return f"no judgements.jsonl lies in {', '.join(map(str, without))}"
    return None
