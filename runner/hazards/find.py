# SPDX-License-Identifier: Apache-2.0
"""Hazards of a program, found in what it was traced to draw, before step 0.

`runner.hazards.key_rules` looks at keys, `runner.hazards.stream_rules` at streams;
here is which of what they find stops a run.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from runner.errors import HazardsRefusedError
from runner.hazards.hazard import Hazard, Severity
from runner.hazards.key_rules import find_key_hazards
from runner.hazards.places import find_places
from runner.hazards.stream_rules import find_stream_hazards
from runner.program import Compiled

__all__ = ["Hazard", "Severity", "find_hazards", "refuse_hazards"]

_CONFIG_MISTAKES = ("R004", "R007")


def find_hazards(program: Compiled) -> tuple[Hazard, ...]:
    """Every hazard of a program, in the order of their codes."""
    places = find_places(program)
    found = [
        *find_key_hazards(program, places),
        *find_stream_hazards(program, places),
    ]
    return tuple(sorted(_merge(found), key=lambda hazard: (hazard.code, hazard.path)))


def _merge(hazards: Iterable[Hazard]) -> Iterator[Hazard]:
    """What is said alike of several draws is said once; a pair stays a pair."""
    alike: dict[Hazard, dict[str, None]] = {}
    for hazard in dict.fromkeys(hazards):
        if len(hazard.draws) == 1:
            alone = replace(hazard, draws=())
            alike.setdefault(alone, {}).update(dict.fromkeys(hazard.draws))
        else:
            yield hazard
    for alone, draws in alike.items():
        yield replace(alone, draws=tuple(draws))


def refuse_hazards(hazards: tuple[Hazard, ...], *, allow: tuple[str, ...]) -> None:
    """Stops a run that has an error among its hazards.

    Raises:
        HazardsRefusedError: one that `rng.allow` does not name; its exit code is 2
            where all are mistakes in the config, not properties of the program.
    """
    errors = [
        hazard
        for hazard in hazards
        if hazard.severity is Severity.ERROR
        and (hazard.is_fatal or hazard.code not in allow)
    ]
    if not errors:
        return
    lines = [str(hazard) for hazard in errors]
    codes = sorted({h.code for h in errors if not h.is_fatal})
    if codes:
        lines.append(f"If that is meant, set rng.allow=[{','.join(codes)}].")
    separator = " " if len(errors) == 1 else "\n"
    is_config = all(hazard.code in _CONFIG_MISTAKES for hazard in errors)
    raise HazardsRefusedError(separator.join(lines), is_config=is_config)
