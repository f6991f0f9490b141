"""Preference losses: one family a file, each class both the recipe node and the callable.

To add a loss, add one file here with a class under `@register(NAME)`; nothing else lists them.
"""

from mallowspo_cli.objectives.base import (
    Objective,
    ObjectiveOutput,
    PairEntropies,
    PairScores,
    ReferenceScores,
    register,
    registered,
)

__all__ = [
    "Objective",
    "ObjectiveOutput",
    "PairEntropies",
    "PairScores",
    "ReferenceScores",
    "register",
    "registered",
]
