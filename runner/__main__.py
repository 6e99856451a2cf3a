# SPDX-License-Identifier: Apache-2.0
"""`python -m runner`, and the console script `runner`.

Ctrl-C ends quietly from the first line on: the imports below take long enough for one.
"""

import os
import signal

signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from runner.cli import main  # noqa: E402 - see above

__all__ = ["main"]

if __name__ == "__main__":
    main()
