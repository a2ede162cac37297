"""Define the exception for mistakes of the user: programs print one line and exit with code 2."""


class UserError(ValueError):
    """Signals bad input. The message names the input, what is wrong with it and what to do."""
