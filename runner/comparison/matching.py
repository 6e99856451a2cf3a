# SPDX-License-Identifier: Apache-2.0
"""Which entry of the ledger each key is that one phase of a program drew from."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt32

from runner.audit.walk import Use
from runner.comparison.planned import PlannedKeys
from runner.observe.observe import Observation, split_places
from runner.observe.rewrite import LOOP_AXIS, Hidden, Place
from runner.spec import Phase

__all__ = ["Matching", "Words"]

Words = UInt32[np.ndarray, "steps keys words"]


class Matching:
    """What was drawn in one phase so far.

    A *slot* is one key of one place: which entry of the ledger it is, is looked up
    once, and is expected to stay.
    """

    def __init__(self, ledger: Mapping[str, Any], phase: Phase, *, window: int) -> None:
        self.planned = PlannedKeys(ledger, phase, window=window)
        draws = [draw for draw in ledger["draws"] if draw["phase"] == phase]
        self.untraced = [draw for draw in draws if "derivation" not in draw]
        entries = self.planned.entries
        self.uses = [_uses(entry.draw) for entry in entries]
        self.seen = np.zeros(len(entries), bool)
        self.keys = 0
        self.places: list[Place] = []
        self.hidden: tuple[Hidden, ...] = ()
        self.strangers: Counter[Place] = Counter()
        self.cut: set[Place] = set()

    @property
    def has_draws(self) -> bool:
        """Whether anything is drawn, as the ledger or the program has it."""
        return bool(self.untraced or self.places or len(self.seen))

    @property
    def draws(self) -> int:
        """Entries of the ledger that were drawn from."""
        seen = np.flatnonzero(self.seen)
        return len({id(self.planned.entries[k].draw) for k in seen})

    def beyond(self) -> list[dict[str, Any]]:
        """Draws that could not be compared, and why."""
        rows: list[tuple[Any, ...]] = [
            (p.path, p.use.primitive, self._why_untraced(p), n)
            for p, n in self.strangers.items()
        ]
        rows += [(h.path, h.primitive, h.why, None) for h in self.hidden]
        why = "some iterations of a while loop were not observed"
        rows += [(p.path, p.use.primitive, why, None) for p in self.cut]
        names = ("path", "primitive", "why", "keys")
        return [
            dict(zip(names, (list(path), *rest), strict=True)) for path, *rest in rows
        ]

    def compare(
        self, planned: Words, observed: list[Observation]
    ) -> tuple[int, str] | None:
        """The first step that differs, counted from the first given, and how."""
        words, drawn = self._slots(observed, width=planned.shape[-1])
        planned = _widen(planned[: len(words)], words.shape[-1])
        entry, row = np.full(drawn.shape, -1), 0
        while row < len(words):
            agree = self._agree(planned[row:], words[row:]) | ~drawn[row:]
            bad = np.flatnonzero(~agree.all(axis=1))
            stop = row + int(bad[0]) if bad.size else len(words)
            entry[row:stop] = self.match
            if stop < len(words):
                slots = np.flatnonzero(~agree[bad[0]])
                if what := self._look_up(
                    planned[stop], words[stop], drawn[stop], slots
                ):
                    return stop, what
                entry[stop] = self.match
                stop += 1
            row = stop
        return self._count(np.where(drawn, entry, -1), planned, drawn)

    def _slots(
        self, observed: list[Observation], *, width: int
    ) -> tuple[Words, Bool[np.ndarray, "steps slots"]]:
        """The words of all keys side by side, and whether each was drawn from."""
        parts = [part for each in observed for part in split_places(each)]
        if not self.places:
            places = [place for each in observed for place in each.places]
            self.places = [place for place in places for _ in range(place.keys)]
            self.hidden = observed[0].hidden if observed else ()
            self.match = np.full(len(self.places), -1)
            ends = [_last_iterations(place) for place in places]
            self.ends = np.concatenate(ends) if ends else np.zeros(0, bool)
        if not parts:
            steps = len(np.atleast_2d(observed[0].words)) if observed else 0
            return np.zeros((steps, 0, width), np.uint32), np.zeros((steps, 0), bool)
        width = max(width, *(part.shape[-1] - 1 for part in parts))
        words = [_widen(part[..., :-1], width) for part in parts]
        drawn = [part[..., -1] != 0 for part in parts]
        return np.concatenate(words, axis=1), np.concatenate(drawn, axis=1)

    def _agree(self, planned: Words, words: Words) -> Bool[np.ndarray, "steps slots"]:
        agree, known = np.zeros(words.shape[:2], bool), self.match >= 0
        equal = planned[:, self.match[known]] == words[:, known]
        agree[:, known] = equal.all(axis=-1)
        return agree

    def _look_up(
        self, planned: Any, words: Any, drawn: Any, slots: Int[np.ndarray, " some"]
    ) -> str:
        """Finds the entries of some slots at one step; what is wrong, if anything."""
        index: dict[bytes, list[int]] = {}
        for k, key in enumerate(planned):
            index.setdefault(key.tobytes(), []).append(k)
        problems, met = [], set[int]()
        for slot in slots:
            place, found = self.places[slot], index.get(words[slot].tobytes(), [])
            fits = [k for k in found if place.use in self.uses[k]]
            said = _spell(place, words[slot])
            met |= set(found)
            self.match[slot] = fits[0] if fits else -1
            if found and (not fits or self._is_other(place, fits)):
                problems.append(f"{said}, the key of {self._name(found[0])}")
            elif not found and self._why_untraced(place):
                self.strangers[place] += 1
            elif not found:
                problems.append(f"{said}, which is not planned")
        if not problems:
            return ""
        lost = sorted(set(range(len(planned))) - met - set(self.match[drawn]))
        return "; ".join([problems[0], *(self._lost(k, planned) for k in lost[:1])])

    def _is_other(self, place: Place, entries: list[int]) -> bool:
        """Whether this is a draw without a derivation that has the key of another."""
        path = _once(place.path)
        names = [_once(self.planned.entries[k].draw["path"]) for k in entries]
        return path not in names and any(
            _once(draw["path"]) == path and place.use in _uses(draw)
            for draw in self.untraced
        )

    def _count(self, entry: Any, planned: Words, drawn: Any) -> tuple[int, str] | None:
        """Counts what was drawn; the first planned key that was not drawn from."""
        covered = np.zeros(planned.shape[:2], bool)
        steps, slots = np.nonzero(entry >= 0)
        covered[steps, entry[steps, slots]] = True
        ends = np.flatnonzero((drawn & self.ends).any(axis=0))
        self.cut |= {self.places[slot] for slot in ends}
        for step in np.flatnonzero(~covered.all(axis=1)):
            if what := self._missing(covered[step], planned[step]):
                return int(step), what
        self.keys += int(covered.sum())
        self.seen |= covered.any(axis=0)
        return None

    def _missing(self, covered: Any, planned: Any) -> str:
        """A planned key of one step that nothing excuses; empty where there is none.

        A branch that was not taken excuses one, an entry with the same key, and draws
        of its kind that can't be observed.
        """
        twins = {planned[k].tobytes() for k in np.flatnonzero(covered)}
        unseen = {h.primitive for h in self.hidden}
        unseen |= {place.use.primitive for place in self.cut}
        for k in np.flatnonzero(~covered):
            is_conditional = self.planned.entries[k].draw.get("conditional", False)
            is_unseen = any(use.primitive in unseen for use in self.uses[k])
            if not (is_conditional or is_unseen or planned[k].tobytes() in twins):
                return self._lost(int(k), planned)
        return ""

    def _lost(self, k: int, planned: Any) -> str:
        return f"{self._name(k)} is planned with {_hex(planned[k])} and not drawn"

    def _name(self, k: int) -> str:
        uses = ", ".join(map(_spell_use, sorted(self.uses[k], key=str)))
        return f"{self.planned.entries[k]} ({uses})"

    def _why_untraced(self, place: Place) -> str:
        """Why the ledger has no derivation for draws of this use; empty if it has."""
        why = [draw["untraced"] for draw in self.untraced if place.use in _uses(draw)]
        return why[0] if why else ""


def _uses(draw: Mapping[str, Any]) -> frozenset[Use]:
    return frozenset(
        Use(use["primitive"], tuple(use["shape"]), use["bits"]) for use in draw["uses"]
    )


def _last_iterations(place: Place) -> Bool[np.ndarray, " keys"]:
    """The keys of a place that stand for the last iteration a loop has room for."""
    sizes = [size for _, size in place.axes]
    last = np.zeros(sizes, bool)
    for axis, (name, size) in enumerate(place.axes):
        if name == LOOP_AXIS:
            last[(slice(None),) * axis + (size - 1,)] = True
    return last.ravel()


def _widen(words: Any, width: int) -> Any:
    """Zeros after the words of a key, so that keys of two implementations compare."""
    more = width - words.shape[-1]
    return np.pad(words, [(0, 0), (0, 0), (0, more)]) if more else words


def _spell(place: Place, key: Any) -> str:
    path = "/".join(_once(place.path)) or "(root)"
    return f"{path} drew {_spell_use(place.use)} from {_hex(key)}"


def _spell_use(use: Use) -> str:
    return f"{use.primitive} {list(use.shape)}"


def _hex(key: Any) -> str:
    return " ".join(f"{word:08x}" for word in key)


def _once(path: Sequence[str]) -> tuple[str, ...]:
    """A path in which no name follows itself: transforms repeat a module's name."""
    return tuple(name for name, _ in groupby(path))
