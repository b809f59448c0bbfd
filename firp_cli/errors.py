"""Errors that a user can cause and mend.

The core raises them; `commands/` prints the message (one or two lines, the remedy included) and exits with `exit_code`.
"""

INTERRUPTED = 130  # exit code after Ctrl-C or SIGTERM


class FirpError(Exception):
    """Base of every error meant for the user: its text says what is wrong and what to do about it."""

    exit_code = 1
    agreed = False  # True where every rank of a run raises it


class UsageError(FirpError):
    """The command line or a file named on it asks for something that does not exist or does not fit."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe has an unknown or duplicate key, a wrong type, or a value out of range."""


class DatasetError(UsageError):
    """A data set cannot be found, read or understood."""


class LossMaskError(DatasetError):
    """A chat template left no token, or every token, to learn from."""


class TeacherError(UsageError):
    """A teacher cannot be loaded, or its layers do not reproduce its own logits."""


class StoreError(FirpError):
    """A hidden-state store is missing, damaged or incomplete."""


class FingerprintError(FirpError):
    """Two artefacts were made with different teachers, tokenizers or chat templates."""


class PredictorError(UsageError):
    """A predictor folder is missing, incomplete or does not fit the teacher."""


class NumericsError(FirpError):
    """NaN or infinity in hidden states or in a loss."""


class CapacityError(UsageError):
    """A request does not fit: prompt against cache, tree against context, data against disk."""


class LaunchError(FirpError):
    """Ranks could not be started, or one of them failed."""


class ClusterError(LaunchError):
    """The machines or devices that ranks were to be started on do not exist or are not understood."""

    exit_code = 2


class PeerLostError(LaunchError):
    """Another rank of the run ended before its time."""
