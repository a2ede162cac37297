"""Run ``fid-eval``, or ``python -m fid_eval`` behind a launcher."""

import os
import sys
import traceback
from collections.abc import Sequence

from .cli import check_files, parse, program_name
from .errors import EvaluationError, describe_error
from .saved_references import saved_references
from .time_limit import exit_if_threads_hang


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code.

    Only rank 0 reports errors, by output and exit code: a launcher stops all ranks when one fails.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    is_rank0 = int(os.environ.get("RANK", "0")) == 0
    try:
        options = parse(argv)
        if is_rank0:
            check_files(options)
        if options.command == "references":
            for name, path in saved_references().items():
                print(f"{name}\t{path}")
            return 0
        # Imports torch, hence only after the checks.
        from .commands import run

        code, message = run(options), None
    except BrokenPipeError:  # The reader of a pipe, such as `head`, has closed it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        code, message = 2, describe_error(error)
        if "--debug" in argv and is_rank0:
            traceback.print_exception(error)
        elif not isinstance(error, EvaluationError | OSError):
            message += "; --debug shows the traceback"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    if message is not None and is_rank0:
        print(f"{program_name(argv)}: error: {message}", file=sys.stderr, flush=True)
    code = code if is_rank0 else 0
    exit_if_threads_hang(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
