"""Write text into CSV files so that spreadsheets show it."""

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def plain_cell(value: object) -> object:
    """Return a CSV cell that a spreadsheet shows as text instead of running it as a formula.

    Text that starts like a formula gets an apostrophe in front. Other values do not change.
    """
    is_formula = isinstance(value, str) and len(value) > 1 and value.startswith(FORMULA_STARTS)
    return f"'{value}" if is_formula else value
