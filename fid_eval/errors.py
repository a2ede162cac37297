"""The one exception that means: the user can mend this. Programs print it as one line, exit 2."""


class EvaluationError(ValueError):
    """Bad input. The message names the input, what is wrong with it and what to do."""
