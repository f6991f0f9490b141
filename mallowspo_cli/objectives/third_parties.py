"""Objectives of other installed packages: modules that they name as entry points.

[project.entry-points."mallowspo.objectives"]
anything = "their_package.their_losses"
"""

import functools
from importlib.metadata import entry_points
from typing import Final

from mallowspo_cli.errors import RecipeError

GROUP: Final = "mallowspo.objectives"


@functools.cache
def import_third_parties() -> None:
    """Import every module named in the group `mallowspo.objectives`, once in a process.

    Raises RecipeError naming the package, the module and the cause if an import fails: its
    objectives would otherwise be missing without a word.
    """
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            package = point.dist.name if point.dist else "a package"
            cause = " ".join(str(error).split())
            raise RecipeError(
                f"{package} offers objectives, but its module {point.value} cannot be imported "
                f"({type(error).__name__}: {cause}). Mend {package}, or uninstall it."
            ) from error
