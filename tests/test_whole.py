# SPDX-License-Identifier: Apache-2.0
"""What the whole train step draws: backward passes and optimizers included."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from runner.audit.trace import Draw
from runner.compile import compile_run
from runner.errors import ConfigError
from runner.hazards.find import find_hazards
from runner.keys import rng_flags
from runner.ledger import make_ledger
from runner.model import Model, trace_model
from runner.parse import Node, freeze
from runner.program import Program
from runner.spec import Phase, RunSpec

PACKAGE = "lab_of_test_whole"
DROPOUT = "+experiment=dropout"
NOISY = (
    "optimizer._target_=optax.add_noise",
    "~optimizer.learning_rate",
    "+optimizer.eta=0.1",
    "+optimizer.gamma=0.5",
    "+optimizer.key=3",
)

DENSE = {"_target_": "flax.linen.Dense", "features": 10}

pytestmark = pytest.mark.promotes


@jax.custom_vjp
def round_gradient(x: Any, key: Any) -> Any:
    """x; its gradient is rounded to 1 / 8 at random."""
    return x


def _forward(x: Any, key: Any) -> Any:
    return x, key


def _backward(key: Any, gradient: Any) -> Any:
    noise = jax.random.uniform(key, gradient.shape)
    return jnp.floor(gradient * 8 + noise) / 8, None


round_gradient.defvjp(_forward, _backward)


class Rounds(nn.Module):
    """Draws in its backward pass alone, from a stream or from a key of its own."""

    own: bool = False

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        h = nn.Dense(10)(x.reshape(x.shape[0], -1))
        if not train:
            return h
        return round_gradient(h, self.key())

    def key(self) -> Any:
        """The key of the rounding."""
        return jax.random.key(7) if self.own else self.make_rng("dropout")


def is_small(x: Any) -> Any:
    """Condition of a loop."""
    return x.max() < 10


def choose(x: Any) -> Any:
    """Number of a branch."""
    return (x.sum() > 0).astype(jnp.int32)


@pytest.fixture(autouse=True, scope="module")
def lab() -> Iterator[None]:
    module: Any = ModuleType(PACKAGE)
    module.Rounds = Rounds
    module.is_small, module.choose = is_small, choose
    Rounds.__module__ = is_small.__module__ = choose.__module__ = PACKAGE
    sys.modules[PACKAGE] = module
    yield
    del sys.modules[PACKAGE]


def with_node(spec: RunSpec, node: Any) -> RunSpec:
    return replace(spec, model=Node(freeze(node, path="model")), trusted=(PACKAGE,))


def with_model(spec: RunSpec, **fields: Any) -> RunSpec:
    return with_node(spec, {"_target_": f"{PACKAGE}.Rounds", **fields})


def train_draws(program: Any) -> tuple[Draw, ...]:
    return tuple(program.traces[Phase.TRAIN].draws)


def meaning(draws: Any) -> set[Any]:
    """What is drawn, from where; two accounts may list it in another order."""
    return {(d.stream, d.ops, d.path, d.call, d.use, d.untraced) for d in draws}


@pytest.mark.parametrize(
    "overrides",
    [
        (DROPOUT,),
        ("+experiment=deep", "model.depth=3"),
        ("+experiment=cnn",),
        (DROPOUT, "train.accumulation_steps=2"),
        (DROPOUT, "train.compute_dtype=bfloat16", "train.clip_norm=1"),
    ],
    ids=" ".join,
)
def test_a_gradient_draws_what_its_model_draws(
    make_spec: Any, overrides: tuple[str, ...]
) -> None:
    """Rematerialized blocks are computed twice, and draw from the same keys."""
    program = compile_run(make_spec(*overrides))
    assert isinstance(program, Program)
    rows = program.microbatch.shape[0]
    with rng_flags(program.spec.rng):
        forward = trace_model(
            Model.of(program.spec),
            plan=program.plan,
            x=program.microbatch,
            eval_rows=rows,
            keys=program.keys,
            hypers=dict.fromkeys(program.hypers, jnp.float32(0.5)),
        )
    assert meaning(train_draws(program)) == meaning(forward[Phase.TRAIN].draws)
    assert len(train_draws(program)) == len(forward[Phase.TRAIN].draws) > 0


def test_a_draw_of_the_backward_pass_is_in_the_ledger(make_spec: Any) -> None:
    program = compile_run(with_model(make_spec(DROPOUT)))
    (draw,) = train_draws(program)
    assert (draw.stream, draw.path, draw.untraced) == ("dropout", (), "")
    assert draw.use.shape == (128, 10)
    (row,) = [r for r in make_ledger(program)["draws"] if r["phase"] == "train"]
    assert row["derivation"][-1]["op"] == "fold_in"
    assert [h.code for h in find_hazards(program)] == []


def test_a_branch_that_is_computed_again(make_spec: Any) -> None:
    """Its keys come to the backward pass beside a placeholder of the other branch."""
    block = {"_target_": "models.ResidualMLPBlock", "dropout_rate": 0.5}
    scan = {"lift": "scan", "length": 2, "module": {"lift": "remat", "module": block}}
    scan |= {"variable_axes": {"params": 0}}
    scan |= {"split_rngs": {"params": True, "dropout": True}}
    switch = {"lift": "switch", "index": {"_target_": f"{PACKAGE}.choose"}}
    switch |= {"branches": [scan, DENSE]}
    layers = [{"_target_": "models.Flatten"}, DENSE, switch, DENSE]
    node = {"_target_": "models.Sequential", "layers": layers}
    program = compile_run(with_node(make_spec(DROPOUT), node))
    (draw,) = train_draws(program)
    assert (draw.stream, draw.axes, draw.untraced) == (
        "dropout",
        (("scan:layers_2/branches_0", 2),),
        "",
    )
    assert [hazard.code for hazard in find_hazards(program)] == []


def test_a_constant_of_the_backward_pass_is_a_hazard(make_spec: Any) -> None:
    program = compile_run(with_model(make_spec(DROPOUT), own=True))
    codes = {hazard.code: hazard for hazard in find_hazards(program)}
    assert "key(7)" in codes["R014"].what
    assert codes["R014"].path == "model"


def test_a_model_that_has_no_gradient(make_spec: Any) -> None:
    """JAX can't differentiate a while loop; that is said before step 0."""
    loop = {
        "lift": "while_loop",
        "cond_fn": {"_target_": f"{PACKAGE}.is_small"},
        "body_fn": {"_target_": "jax.nn.softplus"},
    }
    layers = [{"_target_": "models.Flatten"}, DENSE, loop, DENSE]
    node = {"_target_": "models.Sequential", "layers": layers}
    spec = with_node(make_spec(DROPOUT), node)
    with pytest.raises(ConfigError, match=r"^model: its gradient raised ValueError: "):
        compile_run(spec)


def test_what_an_optimizer_draws_is_listed(make_spec: Any) -> None:
    program = compile_run(make_spec(DROPOUT, *NOISY))
    rows = [r for r in make_ledger(program)["draws"] if r["path"] == ["optimizer"]]
    assert [(r["phase"], r["stream"]) for r in rows] == [("train", None)] * 6
    (hazard,) = (h for h in find_hazards(program) if h.code == "R014")
    assert (hazard.path, hazard.draws) == ("optimizer", ("train optimizer",))


def test_it_is_refused_unless_it_is_allowed(runner: Any) -> None:
    refused = runner(DROPOUT, *NOISY, "train.steps=3", "sinks=none")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: R014: optimizer: draws from a key of no")
    allowed = runner(DROPOUT, *NOISY, "train.steps=3", "sinks=none", "rng.allow=[R014]")
    assert allowed.returncode == 0, allowed.stderr
