# SPDX-License-Identifier: Apache-2.0
"""`runner diff RUN RUN`: why two recorded runs are different."""

import argparse
import json

from runner.errors import RecordError
from runner.records.record import read_record

__all__ = ["main"]

_MISSHAPEN = (
    *(LookupError, TypeError, AttributeError, ValueError),
    *(OverflowError, RecursionError),
)


def main(args: list[str]) -> int:
    """Prints what differs, as tables or as one JSON document; 0 equal, 1 differ."""
    options = _parser().parse_args(args)
    a, b = (read_record(run) for run in (options.a, options.b))
    from runner.differences.find import find_differences
    from runner.differences.text import differences_lines

    try:
        found = find_differences(a, b)
        document = json.dumps(found.to_plain(), indent=1, allow_nan=False)
        lines = list(differences_lines(found))
    except _MISSHAPEN as error:
        what = f"a field is missing or of another kind ({error!r})"
        raise RecordError(f"{options.a}, {options.b}: damaged: {what}.") from error
    print(document if options.json else "\n".join(lines))
    return 0 if found.are_equal else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="runner diff", description=__doc__)
    for name in ("a", "b"):
        help_ = "run directory, .zip or .tar.gz"
        parser.add_argument(name, metavar="RUN", help=help_)
    parser.add_argument("--json", action="store_true", help="one JSON document")
    return parser
