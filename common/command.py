"""What all command lines have in common: how they end.

@one_line_errors
def main(argv=None) -> int: ...

if __name__ == "__main__":
    run_command(main)
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn

WRONG_USE = 2
INTERRUPTED = 130  # exit codes as shells give them: 128 + the signal's number
READER_GONE = 141


def one_line_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Decorator of `main`: what its user can mend (ValueError, OSError) becomes one line on standard error and exit code 2."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except BrokenPipeError:  # an OSError, which `run_command` ends without a word
            raise
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return WRONG_USE

    return run


def run_command(main: Callable[[], int]) -> NoReturn:
    """End the process with the exit code of `main`. Ctrl-C and a closed output pipe end it without a traceback."""
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        # What is still buffered goes nowhere, else the interpreter complains about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = READER_GONE
    sys.exit(code)


def check_early(name: str, check: Callable[[], object]) -> None:
    """Answer --help and wrong options of a command before what follows is imported, since torch takes seconds.

    Args:
        name: `__name__` of the module; where it is not run as a command, nothing happens.
        check: reads the command line; raises for what it does not understand.
    """
    if name != "__main__":
        return
    try:
        check()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_USE)


def no_command(instead: str) -> NoReturn:
    """For `python -m` of a module that is no command: name the command that is meant, instead of doing nothing."""
    print(f"error: this module is no command; {instead}", file=sys.stderr)
    sys.exit(WRONG_USE)
