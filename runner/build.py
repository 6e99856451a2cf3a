# SPDX-License-Identifier: Apache-2.0
"""Plain trees of `_target_` nodes to Flax modules and optax transforms.

    {_target_: a.b.C, _args_: [...], _partial_: true, key: value, ...}
    {lift: scan, name: layers, module: {_target_: ...}, ...}    see `runner.lift.build`

A node's other keys are the arguments of what it names, nested nodes built first;
`_args_` are positional ones, `_partial_` binds instead of calling. Lists become
tuples, mappings without `_target_` stay mappings, names of dtypes become dtypes where
one is expected. Every other leaf is passed on untouched, so that a caller may put a
traced scalar in a float's place. `runner.targets` says what may be named.

`hydra.utils.instantiate` is not used: its list of bad names is no boundary.
"""

import functools
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import Parameter
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from runner.errors import TargetError, did_you_mean
from runner.lift.build import build_lift
from runner.targets import NEEDS_VALUE, Target, Use, first_line, resolve_target

if typing.TYPE_CHECKING:
    import optax

__all__ = ["build_module", "build_optimizer"]

_KEYS = ("_target_", "_args_", "_partial_")
_ARRAYS = (jax.Array, np.ndarray, np.generic)
_WORDS = {"Callable": "function", "Mapping": "mapping", "NoneType": "null"}


def build_module(node: Any, *, path: str, trusted: tuple[str, ...]) -> nn.Module:
    """Builds the Flax module that a config describes.

    Its parameter paths, keys and bits are those of the same module written by hand.

    Args:
        node: A `_target_` node; or a mapping that holds one under `module`, beside
            plain values that are only there to be interpolated.
        path: Where it stands in the config, for messages.
        trusted: The user's packages whose code may run.

    Raises:
        TargetError: something can't, or may not, be built.
    """
    node, path = _unwrap(node, inner="module", path=path)
    made = _build_node(node, path=path, trusted=trusted, is_root=True)
    if not isinstance(made, nn.Module):
        where, got = f"{path}._target_", node["_target_"]
        raise TargetError(where, "must make a Flax module", got=got)
    return made


def build_optimizer(
    node: Any, *, path: str, trusted: tuple[str, ...]
) -> "optax.GradientTransformation":
    """Builds the optax transform that a config describes.

    Args:
        node: A `_target_` node; or a mapping that holds one under `transform`, beside
            plain values that are only there to be interpolated.
        path: Where it stands in the config, for messages.
        trusted: The user's packages whose code may run.

    Raises:
        TargetError: something can't, or may not, be built.
    """
    import optax

    node, path = _unwrap(node, inner="transform", path=path)
    made = _build_node(node, path=path, trusted=trusted, is_root=True)
    if not isinstance(made, optax.GradientTransformation):
        where, got = f"{path}._target_", node["_target_"]
        raise TargetError(where, "must make an optax transform", got=got)
    return made


def _unwrap(node: Any, *, inner: str, path: str) -> tuple[Mapping[str, Any], str]:
    if isinstance(node, Mapping) and inner in node and not _is_node(node):
        for key, value in node.items():
            if key != inner and not _is_plain(value):
                rule = f"only plain values may stand beside {inner}"
                raise TargetError(f"{path}.{key}", rule, got=value)
        node, path = node[inner], f"{path}.{inner}"
    if not _is_node(node) or (inner != "module" and _is_lift(node)):
        rule = f"must be a mapping with a _target_, or with one under {inner}"
        raise TargetError(path, rule, got=node)
    return node, path


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return not isinstance(value, Mapping)


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and ("_target_" in value or "lift" in value)


def _is_lift(node: Mapping[str, Any]) -> bool:
    return "_target_" not in node


def _build(value: Any, *, path: str, trusted: tuple[str, ...]) -> Any:
    if _is_node(value):
        return _build_node(value, path=path, trusted=trusted)
    build = functools.partial(_build, trusted=trusted)
    if isinstance(value, Mapping):
        return {k: build(v, path=f"{path}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(build(v, path=f"{path}[{i}]") for i, v in enumerate(value))
    return value


def _build_node(
    node: Mapping[str, Any],
    *,
    path: str,
    trusted: tuple[str, ...],
    is_root: bool = False,
) -> Any:
    if _is_lift(node):
        build = functools.partial(_build, trusted=trusted)
        return build_lift(node, path=path, build=build)
    where = f"{path}._target_"
    target = resolve_target(node["_target_"], path=where, trusted=trusted)
    arguments = list(_match(node, target, path))
    given = {a.parameter.name for a in arguments}
    missing = [name for name in target.required if name not in given]
    binds = node.get("_partial_", False) or target.use is Use.BIND
    binds |= bool(missing) and target.use is Use.EITHER and not is_root
    if missing and not binds:
        rule = f"{target.name} needs {', '.join(missing)}"
        raise TargetError(path, rule, allowed=f"Signature: {target.signature}")
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in arguments:
        value = _read(argument, target, trusted)
        if isinstance(argument.key, int):
            args.append(value)
        else:
            kwargs[argument.key] = value
    if binds:
        bound = functools.partial(target.object, *args, **kwargs)
        return bound if arguments else target.object
    return _call(target, args, kwargs, path)


class _Argument(NamedTuple):
    key: int | str
    value: Any
    path: str
    parameter: Parameter


def _match(node: Mapping[str, Any], target: Target, path: str) -> Iterator[_Argument]:
    """The arguments of a node, each with the parameter that takes it."""
    args, partial = node.get("_args_", ()), node.get("_partial_", False)
    if not isinstance(args, list | tuple):
        raise TargetError(f"{path}._args_", "must be a list", got=args)
    if not isinstance(partial, bool):
        raise TargetError(f"{path}._partial_", "must be true or false", got=partial)
    given: list[tuple[int | str, Any, str]]
    given = [(i, value, f"{path}._args_[{i}]") for i, value in enumerate(args)]
    given += [(str(k), v, f"{path}.{k}") for k, v in node.items() if k not in _KEYS]
    for key, value, leaf in given:
        parameter = target.parameter(key)
        rule = f"not an argument of {target.name}"
        fix = did_you_mean(str(key), target.parameters)
        if parameter is not None and parameter.name in target.left:
            rule = f"{target.name} gets {parameter.name} when it is called"
            parameter = fix = None
        if parameter is None or str(key).startswith("_"):
            got = value if isinstance(key, int) else key
            allowed = f"Signature: {target.signature}"
            raise TargetError(leaf, rule, got=got, allowed=allowed, fix=fix)
        yield _Argument(key, value, leaf, parameter)


def _read(argument: _Argument, target: Target, trusted: tuple[str, ...]) -> Any:
    key, raw, path, parameter = argument
    value = _build(raw, path=path, trusted=trusted)
    name = key if isinstance(key, str) else parameter.name
    takes_dtype = name == "dtype" or name.endswith("_dtype")
    if takes_dtype and isinstance(value, str) and parameter.annotation is not str:
        return _parse_dtype(value, path=path)
    if not _fits(value, parameter.annotation):
        rule = f"must be {_spell(parameter.annotation)} for {target.name}"
        got = raw.get("_target_", raw) if _is_node(raw) else raw
        raise TargetError(path, rule, got=got)
    return value


def _parse_dtype(name: str, *, path: str) -> np.dtype[Any]:
    try:
        dtype = jnp.dtype(name)
    except Exception:  # TypeError; a warning about an old alias, made an error
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.number):
        allowed = "For example: bfloat16, float16, float32, int32"
        raise TargetError(path, "not a dtype", got=name, allowed=allowed)
    return dtype


def _call(target: Target, args: list[Any], kwargs: dict[str, Any], path: str) -> Any:
    try:
        made = target.object(*args, **kwargs)
    except NEEDS_VALUE:
        raise  # `runner.compile` makes the number that it is about a constant
    except Exception as error:
        rule = f"{target.name} failed with {first_line(error)}"
        raise TargetError(path, rule) from error
    if target.package == "optax":
        import optax

        if not callable(made) and not isinstance(made, optax.GradientTransformation):
            rule = "makes neither a transform nor a schedule"
            raise TargetError(f"{path}._target_", rule, got=target.name)
    return made


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what a simple hint says; other hints take anything."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in args)
    if origin is Literal:
        return value in args
    if _is_float(origin):
        return is_int or isinstance(value, (float, *_ARRAYS))
    if not isinstance(origin, type):
        return True
    if origin is int:
        return is_int
    if origin in (bool, str, types.NoneType):
        return isinstance(value, origin)
    if _is_function(origin):
        return callable(value) or isinstance(value, nn.Module)
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if issubclass(origin, Sequence):
        each = args[0] if len({*args} - {...}) == 1 else Any
        fits = isinstance(value, tuple) and all(_fits(v, each) for v in value)
        return fits or isinstance(value, _ARRAYS)
    return True


def _is_float(origin: Any) -> bool:
    """Numbers and arrays, those of jaxtyping included."""
    is_number = isinstance(origin, type) and issubclass(origin, (float, *_ARRAYS))
    return is_number or origin is complex or hasattr(origin, "array_type")


def _is_function(origin: Any) -> bool:
    """Callables: modules, and protocols such as Flax's `Initializer`."""
    is_protocol = getattr(origin, "_is_protocol", False) and "__call__" in vars(origin)
    return bool(is_protocol or origin is Callable or issubclass(origin, nn.Module))


def _spell(hint: Any) -> str:
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(map(_spell, args)))
    if origin is Literal:
        return " | ".join(map(repr, args))
    if origin in (list, tuple, Sequence):
        return " of ".join(["list", *map(_spell, args[:1])])
    if _is_float(origin):
        return "float"
    name = getattr(origin, "__name__", str(hint))
    return _WORDS.get(name, name)
