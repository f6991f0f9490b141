"""What the user can mend. Each message says what was found, what was expected and what to do."""


class MallowsPOError(Exception):
    """Base of every error that the command line prints as one line, with exit code 2."""

    exit_code = 2
    alone = False
    """Whether one process of a launch may have it without the others, and so has to say it."""


class RecipeError(MallowsPOError):
    """A recipe, an override or a knob that cannot be used."""


class DataError(MallowsPOError):
    """Preference data that cannot be read or trained on."""


class ModelError(MallowsPOError):
    """A model source that cannot be fetched, read or scored."""


class PackageError(MallowsPOError):
    """A package of the package index that cannot be fetched."""


class CacheError(MallowsPOError):
    """A reference store that does not fit the run."""


class CheckpointError(MallowsPOError):
    """A run directory or checkpoint that cannot be used."""


class TrainingError(MallowsPOError):
    """Training that cannot go on, such as a non-finite loss."""


class LostProcessError(TrainingError):
    """This process of a launch cannot go on: of itself, or since another one ended."""

    alone = True


class EvalError(MallowsPOError):
    """An evaluation that cannot be carried out."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
