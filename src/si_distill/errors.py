"""User-facing errors: the scripts print their text without a traceback."""


class InputError(ValueError):
    """Invalid user input: a setting, a folder, a label. Raised before any long work starts."""


class TrainingStopped(RuntimeError):
    """Training cannot go on (losses not finite, a checkpoint that cannot be written). Saved work is untouched."""


class PublishError(RuntimeError):
    """The Hub refused or could not be reached. Nothing was published, and what was to be published is kept."""


class TrainingInterrupted(Exception):
    """A signal asked training to stop; everything was saved.

    Args:
        message: how to resume.
        signal_number: the signal, so that the script can end with the shell's exit code 128 + n.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number
