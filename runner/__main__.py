# SPDX-License-Identifier: Apache-2.0
"""`python -m runner`."""

from runner.cli import main

if __name__ == "__main__":
    main()
