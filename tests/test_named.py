# SPDX-License-Identifier: Apache-2.0
"""Logical names of activations and of stacked parameters: laid out where rules say."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.linen.spmd import with_logical_constraint

from runner.compile import compile_run
from runner.errors import ConfigError
from runner.hazards.find import find_hazards
from runner.ledger import make_ledger
from runner.loop import Outcome, train
from runner.program import Program
from runner.records.events import TrainRecord
from runner.shardings import list_shardings
from runner.spec import RunSpec, parse_spec

Make = Callable[..., RunSpec]
PACKAGE = "lab_of_test_named"
QUIET = ("sinks=none", "train.compile_cache=null", "eval.every=null", "train.steps=3")
PER = "rng.streams.dropout.per=[step,data,microbatch]"
KERNEL = {
    "_target_": "flax.linen.with_logical_partitioning",
    "fn": {"_target_": "flax.linen.initializers.lecun_normal"},
    "names": ["embed", "mlp"],
}
CONV = {**KERNEL, "names": ["height", "width", "channels_in", "channels"]}
DENSE = {"_target_": "flax.linen.Dense", "kernel_init": KERNEL}
STACKED = {
    "variable_axes": {"params": 0},
    "split_rngs": {"params": True},
    "metadata_params": {"partition_name": "layers"},
}

pytestmark = [pytest.mark.promotes, pytest.mark.xdist_group("named")]


def compiled(spec: RunSpec) -> Program:
    program = compile_run(spec)
    assert isinstance(program, Program)
    return program


def run(program: Program) -> tuple[np.ndarray, Any]:
    """Losses, and the last state."""
    events = list(train(program))
    assert isinstance(events[-1], Outcome)
    assert events[-1].status == "completed"
    records = [event for event in events if isinstance(event, TrainRecord)]
    losses = np.concatenate([record.metrics["loss"] for record in records])
    return losses, events[-1].state


def rows_of(program: Program) -> dict[str, Any]:
    return {row["path"]: row for row in list_shardings(program)}


def scanned() -> dict[str, Any]:
    """Blocks under a scan, whose stacked parameters have an axis `layers`."""
    block = {"_target_": "models.ResidualMLPBlock", "kernel_init": KERNEL}
    scan = {
        **STACKED,
        "lift": "scan",
        "name": "blocks",
        "length": 4,
        "split_rngs": {"params": True, "dropout": True},
        "module": {"lift": "remat", "module": block},
    }
    ends = {"first": 16, "last": 10}
    first, last = ({**DENSE, "name": n, "features": f} for n, f in ends.items())
    return chain(first, scan, last)


def beside() -> dict[str, Any]:
    """Layers beside each other under a vmap, whose parameters have an axis `layers`."""
    vmap = {
        **STACKED,
        "lift": "vmap",
        "name": "members",
        "in_axes": None,
        "axis_size": 4,
        "module": {**DENSE, "features": 10},
    }
    return chain(vmap, {"_target_": "jax.numpy.mean", "axis": 0})


def chain(*layers: Any) -> dict[str, Any]:
    flat = {"_target_": "models.Flatten"}
    return {"_target_": "models.Sequential", "layers": [flat, *layers]}


@pytest.mark.parametrize(
    ("model", "kernel"),
    [(scanned(), "blocks/Dense_0"), (beside(), "members")],
    ids=["scan", "vmap"],
)
def test_layers_of_a_lift_can_be_cut(
    model: Any, kernel: str, compose_config: Callable[..., dict[str, Any]]
) -> None:
    """Each device holds some of the layers; keys are those without a mesh."""
    found = {}
    for mesh in ("none", "data4_model2"):
        plain = compose_config("+experiment=dropout", f"mesh={mesh}", *QUIET)
        plain["model"] = model
        if mesh != "none":
            plain["mesh"]["rules"] = {"batch": "data", "layers": "model"}
        program = compiled(parse_spec(plain))
        found[mesh] = make_ledger(program), *run(program), rows_of(program)
    alone, meshed = found.values()
    assert meshed[0] == alone[0]
    np.testing.assert_allclose(meshed[1], alone[1], rtol=1e-6, atol=0)
    row = meshed[3][f"params/{kernel}/kernel"]
    assert row["names"] == ["layers", "embed", "mlp"]
    assert row["spec"] == ["model", None, None]
    assert row["shard"][0] == 2
    held = meshed[2].params
    for name in kernel.split("/"):
        held = held[name]
    assert held["kernel"].addressable_shards[0].data.shape == tuple(row["shard"])


ACTIVATIONS = {
    "dropout": {
        "MLP/0": (["batch", "mlp"], [32, 8]),
        "MLP/1": (["batch", "mlp"], [32, 4]),
    },
    "deep": {"Sequential/blocks/0": (["batch", "mlp"], [32, 8])},
    "cnn": {
        "CNN/0": (["batch", "height", "width", "channels"], [32, 4, 4, 4]),
        "CNN/1": (["batch", "height", "width", "channels"], [32, 2, 2, 4]),
        "CNN/2": (["batch", "mlp"], [32, 8]),
    },
}
SMALL = {
    "dropout": ("model.features=[16,8]",),
    "deep": ("model.features=16", "model.depth=3"),
    "cnn": ("model.channels=[4,4]", "model.features=[16]"),
}


@pytest.mark.parametrize("experiment", ACTIVATIONS)
def test_activations_lie_as_the_plan_says(
    experiment: str, make_spec: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the compiled program: it is asked how it lays out each of them."""
    base = (f"+experiment={experiment}", *SMALL[experiment], *QUIET)
    spec = make_spec(*base, "mesh=data4_model2")
    rows = rows_of(compiled(spec))
    expected = {f"activations/{k}": v for k, v in ACTIVATIONS[experiment].items()}
    planned = {k: v for k, v in rows.items() if k.startswith("activations/")}
    assert {k: (v["names"], v["shard"]) for k, v in planned.items()} == expected
    for row in planned.values():
        assert row["bytes"] == 4 * np.prod(row["shard"])

    linen: Any = nn
    constrain, laid = linen.with_logical_constraint, []

    def asking(x: Any, names: Any) -> Any:
        y = constrain(x, names)
        jax.debug.inspect_array_sharding(
            jax.lax.stop_gradient(y),
            callback=lambda sharding: laid.append(sharding.shard_shape(x.shape)),
        )
        return y

    monkeypatch.setattr(linen, "with_logical_constraint", asking)
    assert compiled(spec).programs
    assert {tuple(shard) for _, shard in expected.values()} <= set(laid)


@pytest.mark.parametrize("mesh", ["none", "shard_map8", "exact8"])
def test_names_mean_nothing_elsewhere(mesh: str, make_spec: Make) -> None:
    """An array of a program of one device lies there: no constraint is in it."""
    more = {"shard_map8": (PER,), "exact8": ("train.accumulation_steps=8",)}
    spec = make_spec("+experiment=dropout", f"mesh={mesh}", *QUIET, *more.get(mesh, ()))
    assert compiled(spec).activations == ()


class Heads(nn.Module):
    """Two named arrays, in a dict; the function was imported by itself."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(8)(x.reshape(x.shape[0], -1))
        both = {"q": x.reshape(-1, 2, 4), "k": x}
        named = {"q": ("batch", "heads", None), "k": ("batch", "kv/heads")}
        both = with_logical_constraint(both, named)
        return nn.Dense(10)(both["q"].reshape(x.shape) + both["k"])


def test_every_way_to_name_one_is_seen(
    make_spec: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a rule may be for an axis that activations alone have."""
    module: Any = ModuleType(PACKAGE)
    module.Heads = Heads
    monkeypatch.setattr(Heads, "__module__", PACKAGE)
    monkeypatch.setitem(sys.modules, PACKAGE, module)
    spec = make_spec(
        *("+experiment=dropout", "mesh=data4_model2", "~mesh.rules.mlp", *QUIET),
        *("+mesh.rules.heads=model", f"trusted=[{PACKAGE}]"),
        *("~model", f"+model={{_target_: {PACKAGE}.Heads}}"),
    )
    rows = rows_of(compiled(spec))
    found = [rows[f"activations/Heads/{i}"] for i in range(2)]
    assert [row["names"] for row in found] == [
        ["batch", "kv/heads"],
        ["batch", "heads", None],
    ]
    assert [row["shard"] for row in found] == [[32, 8], [32, 1, 4]]


def test_a_stream_that_a_lift_leaves_out_is_still_a_hazard(
    compose_config: Callable[..., dict[str, Any]],
) -> None:
    plain = compose_config("+experiment=dropout", "mesh=data4_model2", *QUIET)
    plain["model"], plain["mesh"]["rules"] = scanned(), {"batch": "data"}
    plain["model"]["layers"][2]["split_rngs"] = {"params": True}
    program = compiled(parse_spec(plain))
    assert any(hazard.is_fatal for hazard in find_hazards(program))


def test_convolutions_have_names_of_their_own(
    compose_config: Callable[..., dict[str, Any]],
) -> None:
    plain = compose_config("+experiment=cnn", "mesh=data4_model2", *QUIET)
    plain["model"] |= {"kernel_init": KERNEL, "conv_kernel_init": CONV}
    plain["mesh"]["rules"] = {"batch": "data", "channels": "model", "mlp": "model"}
    rows = rows_of(compiled(parse_spec(plain)))
    assert rows["params/Conv_1/kernel"]["shard"] == [3, 3, 32, 32]
    assert rows["params/Dense_0/kernel"]["shard"] == [256, 128]
    assert rows["activations/CNN/1"]["spec"] == ["data", None, None, "model"]


def test_a_config_can_name_an_activation(
    compose_config: Callable[..., dict[str, Any]],
) -> None:
    """Between layers of packages that name none."""
    name = {
        "_target_": "flax.linen.with_logical_constraint",
        "logical_axis_resources": ["batch", "mlp"],
    }
    plain = compose_config("+experiment=dropout", "mesh=data4_model2", *QUIET)
    plain["model"] = chain({**DENSE, "features": 32}, name, {**DENSE, "features": 10})
    row = rows_of(compiled(parse_spec(plain)))["activations/Sequential/0"]
    assert (row["names"], row["shard"]) == (["batch", "mlp"], [32, 16])


@pytest.mark.parametrize(
    ("names", "features", "line"),
    [
        (
            ["embed", "mlp"],
            31,
            "mesh.rules.mlp: must divide params/Dense_0/kernel, of shape [64, 31], "
            "into 2 parts (got 31). Change the model, or set mesh.rules.mlp=null.",
        ),
        (
            ["mlp", "mlp"],
            32,
            "model: each axis of params/Dense_0/kernel may have one name of its own "
            "(got ['mlp', 'mlp']). Its shape is [64, 32]. Mend the names in its "
            "initializer, or null for an axis without.",
        ),
        (
            ["embed", "a", "mlp"],
            32,
            "model: each axis of params/Dense_0/kernel may have one name of its own "
            "(got ['embed', 'a', 'mlp']). Its shape is [64, 32]. Mend the names in its "
            "initializer, or null for an axis without.",
        ),
    ],
    ids=["indivisible", "twice", "too_many"],
)
def test_names_that_do_not_fit_are_one_line(
    names: list[str],
    features: int,
    line: str,
    compose_config: Callable[..., dict[str, Any]],
) -> None:
    plain = compose_config("+experiment=mesh/data4_model2", *QUIET)
    plain["model"] |= {
        "features": [features],
        "kernel_init": {**KERNEL, "names": names},
    }
    with pytest.raises(ConfigError) as raised:
        compile_run(parse_spec(plain))
    assert str(raised.value) == line


def test_the_first_rule_has_an_axis_of_the_mesh(make_spec: Make) -> None:
    """As in Flax: rows before the width, where both want one axis."""
    spec = make_spec("+experiment=mesh/fsdp8", "+mesh.rules.mlp=data", *QUIET)
    rows = rows_of(compiled(spec))
    assert rows["params/Dense_0/kernel"]["spec"] == ["data", None]
    assert rows["activations/MLP/0"]["spec"] == ["data", None]
