# SPDX-License-Identifier: Apache-2.0
"""What a `_target_` may name, and what the name really leads to.

A config may come from a stranger, so no name is taken at its word: its package must
be trusted before anything is imported, and the object that it leads to must itself
be defined in a trusted package and be of a kind that is built:

    Flax module             called    a class derived from `flax.linen.Module`
    initializer factory     called    `he_normal`, `normal`, `with_partitioning`
    initializer             bound     `zeros`: takes a key and a shape
    array function          bound     `relu`, `tanh`: takes an array first
    of optax                called    what makes a transform or a schedule
    of models or trusted:
      class                 called
      function              called, or bound while a required argument is missing

Bound is the function itself, or a `functools.partial` of it with the arguments
given. `models.X` is `runner.models.X`, never a `models` package of the user's.
"""

import functools
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from inspect import Parameter, Signature
from typing import Any

import jax
from flax import linen as nn

from runner.errors import TargetError, UntrustedTargetError, did_you_mean

__all__ = ["NEEDS_VALUE", "Target", "Use", "first_line", "resolve_target"]

NEEDS_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
)
"""What Python code raises that must know the value of a traced number."""

_LIBRARIES = ("flax", "jax", "optax")
_ROOTS = {n: n for n in ("flax.linen", "jax", "optax")} | {"models": "runner.models"}
_OF_JAX = ("jax.nn", "jax.nn.initializers", "jax.numpy")
_INITIALIZERS = ("jax.nn.initializers", "flax.linen.initializers")
_WRAPPERS = (nn.with_partitioning, nn.with_logical_partitioning)
_HABITS = {"jnp": "jax.numpy", "linen": "flax.linen", "nn": "flax.linen"}
_HABITS |= {"runner.models": "models"}
_ARRAYS = ("inputs", "lhs", "x")  # first parameters that JAX and Flax don't annotate

_STARS: dict[Any, str] = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}


class Use(Enum):
    """What becomes of a target and its arguments."""

    CALL = "called"
    BIND = "bound"
    EITHER = "called, or bound while a required argument is missing"


@dataclass(frozen=True)
class Target:
    """What a `_target_` names.

    Args:
        name: Its last part, for messages.
        object: The class or function.
        use: Whether it is called or bound.
        package: The trusted package that defines it.
        parameters: By name; string annotations evaluated, Flax's `parent` left out.
    """

    name: str
    object: Callable[..., Any]
    use: Use
    package: str
    parameters: Mapping[str, Parameter]

    @property
    def signature(self) -> str:
        """`Dense(features, use_bias=True, dtype=None, ...)`, on one short line."""
        parts: list[str] = []
        for p in self.parameters.values():
            if p.name == "name" and p.default is None:
                continue
            default = "" if p.default is p.empty else f"={_show(p.default)}"
            parts.append(f"{_STARS.get(p.kind, '')}{p.name}{default}")
            if sum(map(len, parts)) > 80:
                parts[-1] = "..."
                break
        return f"{self.name}({', '.join(parts)})"

    @property
    def required(self) -> list[str]:
        """The parameters that have no default."""
        every = self.parameters.values()
        return [p.name for p in every if p.default is p.empty and p.kind not in _STARS]

    @property
    def left(self) -> list[str]:
        """The parameters that whoever calls the bound function gives."""
        if self.use is not Use.BIND:
            return []
        return list(self.parameters)[: 2 if _initializes(self.parameters) else 1]

    def parameter(self, key: int | str) -> Parameter | None:
        """What the positional argument of that index, or the keyword, reaches."""
        every = [p for p in self.parameters.values() if p.kind not in _STARS]
        if isinstance(key, int):
            star, near = "*", [p for p in every if p.kind is not p.KEYWORD_ONLY][key:]
        else:
            near = [p for p in every if p.kind is not p.POSITIONAL_ONLY]
            star, near = "**", [p for p in near if p.name == key]
        rest = [p for p in self.parameters.values() if _STARS.get(p.kind) == star]
        return next(iter(near + rest), None)


def resolve_target(name: Any, *, path: str, trusted: tuple[str, ...]) -> Target:
    """Finds what a `_target_` names, and refuses all that is not to be built.

    Args:
        name: The value of `_target_`.
        path: Where it stands in the config.
        trusted: The user's packages whose code may run.

    Raises:
        TargetError: an untrusted package, an unknown name, an object defined
            elsewhere, or one of a kind that is not built.
    """
    _check_name(name, path, trusted)
    found = _import(name, path)
    inner = found
    while isinstance(inner, functools.partial):
        inner = inner.func
    origin = getattr(inner, "__module__", None)
    if not callable(found) or not isinstance(origin, str):
        raise TargetError(path, "neither a class nor a function", got=name)
    package = _package(origin, (*_LIBRARIES, "runner.models", *trusted))
    if package is None or _is_python(origin):
        raise TargetError(
            path,
            f"leads to {origin}.{_show(inner)}, which is not of a trusted package",
            got=name,
            allowed=_trusted(trusted),
        )
    parameters = _parameters(found)
    use = _use(found, package, origin, parameters)
    if use is None:
        kinds = "a Flax module, an initializer nor an array function"
        kinds = "a transform nor a schedule" if package == "optax" else kinds
        raise TargetError(path, f"is or makes neither {kinds}", got=name)
    return Target(name.rpartition(".")[2], found, use, package, parameters)


def first_line(error: Exception) -> str:
    """The type of someone's exception, and the first line of what it says."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _check_name(name: Any, path: str, trusted: tuple[str, ...]) -> None:
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise TargetError(path, "must be a name such as flax.linen.Dense", got=name)
    if _is_python(name) or _package(name, (*_ROOTS, *trusted)) is None:
        raise UntrustedTargetError(
            path,
            "not a trusted package",
            got=name,
            allowed=_trusted(trusted),
            fix=_mend(name),
        )
    if any(part.startswith("_") for part in parts):
        raise TargetError(path, "private names are never built", got=name)
    if parts[0] == "jax" and name.rpartition(".")[0] not in _OF_JAX:
        raise TargetError(
            path, "not built", got=name, allowed=f"Of jax: {', '.join(_OF_JAX)}"
        )


def _mend(name: str) -> str:
    root, habit = name.partition(".")[0], _package(name, tuple(_HABITS))
    if habit is not None:
        return f"Did you mean {_HABITS[habit] + name.removeprefix(habit)!r}?"
    if _is_python(name):
        return "Python's own modules are never built"
    if root in (*_LIBRARIES, "runner"):
        return "The rest of that package is never built"
    yours = "if it is yours and you know what it runs"
    return f"Add its package to trusted: [{root}] {yours}"


def _import(name: str, path: str) -> Any:
    """`a.b.C`: C of a.b, which must be a module: there is no walk through objects."""
    place, _, last = name.rpartition(".")
    root = _package(place, tuple(_ROOTS))
    real = place if root is None else _ROOTS[root] + place.removeprefix(root)
    try:
        module = importlib.import_module(real)
        if hasattr(module, last):
            return getattr(module, last)
    except Exception as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is None or _package(real, (absent,)) is None:
            rule = f"{place} can't be imported: {first_line(error)}"
            raise TargetError(path, rule, got=name) from error
        fix = "Is it installed, or its folder on PYTHONPATH?"
        fix = fix if absent == real.partition(".")[0] else ""
        raise TargetError(path, f"no module {place}", got=name, fix=fix) from None
    known = [n for n in dir(module) if not n.startswith("_")]
    raise TargetError(
        path, f"{place} has no {last}", got=name, fix=did_you_mean(last, known)
    )


def _use(
    found: Any, package: str, origin: str, parameters: Mapping[str, Parameter]
) -> Use | None:
    if _is_module(found):
        return None if found is nn.Module else Use.CALL
    if package not in _LIBRARIES:
        return Use.CALL if isinstance(found, type) else Use.EITHER
    if isinstance(found, type):
        return None
    if package == "optax":
        return Use.CALL if _makes_transform(found) else None
    if _initializes(parameters):
        return Use.BIND
    if origin in _INITIALIZERS or found in _WRAPPERS:
        return Use.CALL
    first = next(iter(parameters.values()), Parameter("none", Parameter.KEYWORD_ONLY))
    takes_array = first.name in _ARRAYS or "Array" in str(first.annotation)
    return Use.BIND if takes_array else None


def _makes_transform(found: Any) -> bool:
    """By what it says it returns; what it does return is checked after the call."""
    import optax

    made = inspect.signature(found).return_annotation
    if isinstance(made, type) and issubclass(made, optax.GradientTransformation):
        return True
    return bool(made == optax.Schedule) or made is Signature.empty


def _initializes(parameters: Mapping[str, Parameter]) -> bool:
    return list(parameters)[:2] == ["key", "shape"]


def _parameters(found: Any) -> Mapping[str, Parameter]:
    try:
        parameters = dict(inspect.signature(found).parameters)
    except (TypeError, ValueError):  # written in C: some array function
        parameters = {"x": Parameter("x", Parameter.POSITIONAL_ONLY)}
    if _is_module(found):
        parameters.pop("parent", None)
        if "name" in parameters:  # last, so that no positional argument reaches it
            name = parameters.pop("name")
            parameters["name"] = name.replace(kind=Parameter.KEYWORD_ONLY)
    try:
        hints = typing.get_type_hints(
            found if _is_module(found) else inspect.unwrap(found)
        )
    except Exception:  # a name under TYPE_CHECKING, a partial: what is known will do
        hints = {}
    every = parameters.items()
    return {n: p.replace(annotation=hints.get(n, p.annotation)) for n, p in every}


def _is_module(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, nn.Module)


def _is_python(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


def _package(name: str, packages: tuple[str, ...]) -> str | None:
    inside = [p for p in packages if name == p or name.startswith(f"{p}.")]
    return max(inside, key=len, default=None)


def _trusted(trusted: tuple[str, ...]) -> str:
    return f"Trusted: {', '.join(sorted({*_ROOTS, *trusted}))}"


def _show(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    text = str(name).partition(".<locals>")[0] if name else repr(value)
    return text if len(text) <= 24 else "..."
