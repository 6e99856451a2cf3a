# SPDX-License-Identifier: Apache-2.0
"""Lifted transforms: from `lift:` nodes to Flax modules.

    {lift: scan, name: layers, module: {_target_: ...}, length: 4, variable_axes: ...}

A node's other fields are the arguments of that transform of `flax.linen`, under their
names. `runner.lift.fields` reads them; here the transform is put around the methods
of a module that is built already, so that lifts nest in any order around any module.

Flax's scan and vmap drop keyword arguments, and its remat traces them. So the
transform is applied when the method is called, to a function that has them bound:
a training flag stays a Python bool in every lift. The lifted class keeps the name of
the module's class, as Flax's own (`CheckpointBlock`) would change automatic names.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any

import jax
from flax import linen as nn
from flax.core.scope import subtract_filters, union_filters
from flax.errors import ScopeCollectionNotFound

from runner.errors import RunnerError, TargetError
from runner.lift.checks import (
    check_arguments,
    check_lifted,
    check_out_axes,
    check_variables,
    shape_of,
)
from runner.lift.chunks import plain_scans, scans_in_chunks
from runner.lift.fields import CONTROL, Lift, matches, read_lift
from runner.targets import NEEDS_VALUE, first_line, resolve_target

__all__ = ["build_lift"]

_CONTROLS = {"cond": "Cond", "switch": "Switch", "while_loop": "WhileLoop"}
_FIELDS = {"variables": "variable_filter", "rngs": "rng_filter"}
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_CARRIES = ("scan", "remat_scan")


def build_lift(
    node: Mapping[str, Any], *, path: str, build: Callable[..., Any]
) -> nn.Module:
    """Builds the lifted module that a `lift:` node describes.

    Args:
        node: The node.
        path: Where it stands in the config.
        build: (value, path) to what any other node describes.

    Raises:
        TargetError: a field that this transform doesn't have, or a bad value.
    """
    lift = read_lift(node, path=path, build=build)
    if lift.kind in CONTROL:
        return _build_control(lift)
    module = lift.module
    if not isinstance(module, nn.Module):
        got = node["module"]
        got = got.get("_target_", got) if isinstance(got, Mapping) else got
        raise TargetError(f"{path}.module", "must make a Flax module", got=got)
    name = lift.name
    if name is not None and module.name not in (None, name):
        rule = "the module in a lift has the lift's name"
        fix = f"Remove {path}.module.name"
        raise TargetError(f"{path}.name", rule, got=name, fix=fix)
    base = type(module)
    methods = {m: _lift_method(base, m, lift) for m in _methods(base, lift)}
    lifted: Any = type(base.__name__, (base,), methods)
    fields = {
        f.name: getattr(module, f.name)
        for f in dataclasses.fields(module)
        if f.init and f.name not in ("parent", "name")
    }
    made: nn.Module = lifted(**fields, name=name or module.name)
    return made


def _build_control(lift: Lift) -> nn.Module:
    name = f"models.{_CONTROLS[lift.kind]}"
    target = resolve_target(name, path=lift.path, trusted=())
    fields = {_FIELDS.get(key, key): value for key, value in lift.arguments.items()}
    control: nn.Module = target.object(**fields, name=lift.name)
    return control


def _methods(base: type[nn.Module], lift: Lift) -> tuple[str, ...]:
    given = lift.arguments.get("methods")
    where = f"{lift.path}.module" if given is None else f"{lift.path}.methods"
    methods = tuple(given or ("__call__",))
    names = [f.name for f in dataclasses.fields(base)]
    for method in methods:
        is_own = inspect.isfunction(getattr(base, method, None)) and method not in names
        if not is_own or hasattr(nn.Module, method) is not (method == "__call__"):
            rule = f"not a method of {base.__name__} that can be lifted"
            raise TargetError(where, rule, got=method)
    for name in lift.arguments.get("static_argnames", ()):
        taken = [inspect.signature(getattr(base, m)).parameters for m in methods]
        if not any(name in parameters for parameters in taken):
            rule = f"not an argument of {base.__name__}"
            raise TargetError(f"{lift.path}.static_argnames", rule, got=name)
    return methods


def _lift_method(base: type[nn.Module], name: str, lift: Lift) -> Callable[..., Any]:
    """The method of `base`, lifted each time that it is called."""
    inner = getattr(base, name)
    methods = lift.arguments.get("methods")
    if isinstance(methods, Mapping):
        at = f"{lift.path}.methods.{name}"
        lift = dataclasses.replace(lift, at=at, arguments=methods[name])

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        errors: list[Exception] = []

        def body(module: nn.Module, *inside: Any) -> Any:
            # As in Flax's class form: methods that it calls are not lifted again.
            object.__setattr__(module, "__class__", base)
            try:
                check_variables(module, lift)
                if lift.kind in _CARRIES:
                    inside = _fill(inner, inside)
                with plain_scans():
                    outputs = inner(module, *inside, **kwargs)
                check_variables(module, lift)
            except ScopeCollectionNotFound as error:
                check_lifted(error, lift)
                errors.append(error)
                raise
            except Exception as error:
                errors.append(error)
                raise
            return _as_body(lift, inside, outputs)

        body.__name__ = name
        body.method_handler_wrapped = True  # type: ignore[attr-defined]
        check_arguments(self, args, lift)
        try:
            with scans_in_chunks(lift.arguments.get("chunk")):
                outputs = _transform(self, lift)(body)(self, *args)
        except (RunnerError, *NEEDS_VALUE):
            raise
        except Exception as error:
            if any(error is each for each in errors):
                raise
            said = first_line(error)
            raise TargetError(lift.path, f"nn.{lift.kind} raised {said}") from error
        return _from_body(lift.kind, outputs)

    method.__name__ = name
    method.__doc__ = inner.__doc__
    method.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]
    # As in Flax's class form, it is `inner` alone that Flax wraps: outputs that it
    # captures and names in the profile are there once.
    method.method_handler_wrapped = True  # type: ignore[attr-defined]
    return method


def _transform(module: nn.Module, lift: Lift) -> Callable[..., Any]:
    """The transform with its arguments, such that it can make and keep variables."""
    transform = getattr(nn, lift.kind)
    left = ("chunk", "methods", "static_argnames")  # each keyword is static, see above
    arguments = {k: v for k, v in lift.arguments.items() if k not in left}
    if arguments.get("init"):  # else Flax makes them again beside mutable ones
        arguments["init"] = module.is_initializing()
    carried = arguments.get("variable_carry", False)
    if carried is False:
        return functools.partial(transform, **arguments)
    there = [name for name, tree in module.variables.items() if tree]
    there = [name for name in there if matches(carried, name)]
    if module.is_initializing() and not there:
        return _make_carried(transform, lift.kind, arguments)
    # Flax can't carry what a call may not change; inside, it is the same either way.
    fixed = [name for name in there if not module.is_mutable_collection(name)]
    shared = arguments.get("variable_broadcast", False)
    arguments["variable_broadcast"] = union_filters(shared, fixed)
    return functools.partial(transform, **arguments)


def _make_carried(
    transform: Callable[..., Any], kind: str, arguments: dict[str, Any]
) -> Callable[..., Any]:
    """A scan that makes what it will carry, which Flax's can't.

    It scans over those variables, and keeps the first iteration's.
    """
    carried = arguments["variable_carry"]
    every = {True: 0} if kind == "remat_scan" else {}
    axes = {carried: 0, **arguments.get("variable_axes", every)}
    first = (0,) * len(arguments.get("lengths", (1,)))
    made = subtract_filters(carried, arguments.get("variable_broadcast", False))
    scan = {**arguments, "variable_axes": axes, "variable_carry": False}

    def make(body: Callable[..., Any]) -> Callable[..., Any]:
        return nn.map_variables(
            transform(body, **scan),
            made,
            trans_out_fn=lambda tree: jax.tree.map(lambda leaf: leaf[first], tree),
            mutable=True,
        )

    return make


def _fill(inner: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """None for what a body must be given besides its carry and is not (Flax's `_`)."""
    every = list(inspect.signature(inner).parameters.values())[1:]
    needed = [p for p in every if p.kind in _POSITIONAL and p.default is p.empty]
    return (*args, *[None] * (len(needed) - len(args)))


def _as_body(lift: Lift, inside: tuple[Any, ...], outputs: Any) -> Any:
    """What the transform takes from a body: a scan's is (carry, output)."""
    if lift.kind not in _CARRIES:
        if lift.kind == "vmap":
            check_out_axes(outputs, lift)
        return outputs
    taken = jax.tree.map(shape_of, inside[0])
    carry, output, made = outputs, None, jax.tree.map(shape_of, outputs)
    is_pair = isinstance(outputs, tuple) and len(outputs) == 2 and made != taken
    if is_pair and (lift.kind == "scan" or outputs[1] is None):
        (carry, output), made = outputs, made[0]
    if made != taken:
        raise TargetError(
            f"{lift.path}.module",
            f"nn.{lift.kind} needs a module that returns what it takes",
            got=made,
            allowed=f"It was called with {taken}",
        )
    if lift.kind == "remat_scan":
        return carry
    check_out_axes(output, lift)
    return carry, output


def _from_body(kind: str, outputs: Any) -> Any:
    """A scan without outputs returns its carry, so that it is a layer like any."""
    if kind == "scan" and not jax.tree.leaves(outputs[1]):
        return outputs[0]
    return outputs
