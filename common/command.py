"""What all command lines have in common: how they end.

if __name__ == "__main__":
    run(main)
"""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED = 130  # exit codes as shells give them: 128 + the signal's number
READER_GONE = 141


def run(main: Callable[[], int]) -> NoReturn:
    """End the process with what `main` returns; Ctrl-C, and a reader of the output that is gone, are no tracebacks."""
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
