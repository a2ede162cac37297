"""The one exception that means: the user can mend this. Programs print one line and exit 2."""


class UserError(ValueError):
    """Bad input. The message names the input, what is wrong with it and what to do."""
