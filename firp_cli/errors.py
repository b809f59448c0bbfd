"""Errors that a user can cause and correct.

The core raises them; `cli/` prints the message (one or two lines, the remedy included) and exits with `exit_code`.
"""

INTERRUPTED = 130  # exit code after Ctrl-C or SIGTERM


class FirpError(Exception):
    """Base of every error for the user: its text gives the fault and the remedy."""

    exit_code = 1
    agreed = False  # True where every rank of a run raises it


class UsageError(FirpError):
    """Command line, or a file named on it, that names something nonexistent or contradictory."""

    exit_code = 2


class RecipeError(UsageError):
    """Recipe with an unknown or duplicate key, a wrong type, or a value out of range."""


class DatasetError(UsageError):
    """Data set that cannot be found, read or parsed."""


class LossMaskError(DatasetError):
    """Chat template whose loss mask covers no token, or every token."""


class TeacherError(UsageError):
    """Teacher that cannot be loaded, or whose layers do not reproduce its own logits."""


class StoreError(FirpError):
    """Hidden-state store that is missing, damaged or incomplete."""


class FingerprintError(FirpError):
    """Artefacts made with different teachers, tokenizers or chat templates."""


class PredictorError(UsageError):
    """Predictor folder that is missing, incomplete or does not fit the teacher."""


class OutputError(FirpError):
    """Result that was made and cannot be written. `result`: the result, where no other place has it."""

    result: object = None


class NumericsError(FirpError):
    """NaN or infinity in hidden states, in logits or in a loss. `prompt`: number in its batch of the prompt that was
    decoded; the text then begins with the prompt's name and a colon.
    """

    prompt: int | None = None


class CapacityError(UsageError):
    """Request that exceeds a capacity: prompt and cache, tree and context, data and disk."""


class MethodError(FirpError):
    """Method that a bench, or analysis that an evaluation, cannot measure with this teacher and predictor or under
    these settings: the others go on without it.
    """


class SandboxError(FirpError):
    """Sandbox for the code of answers that cannot stand on this machine: nothing is run."""


class LaunchError(FirpError):
    """Ranks that could not be started, or one that failed."""


class ClusterError(LaunchError):
    """Machines or devices for ranks that do not exist or cannot be parsed."""

    exit_code = 2


class PeerLostError(LaunchError):
    """Early end of another rank of the run."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, with the next one where it ends in a colon; its type where it has none.

    A KeyError's text is only the key: its type stands before it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):
        return ": ".join([type(error).__name__, *lines])
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
