# SPDX-License-Identifier: Apache-2.0
"""What the whole functions of a run draw: not the model alone.

A backward pass may draw (a custom derivative that rounds at random), and so may an
optimizer (`optax.add_noise`). So the train step is traced as it is compiled, with its
gradient and its update; the keys of the streams are inputs, as `runner.keys` derives
them for one microbatch of one step. An evaluation is its model's call.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from runner.audit.marks import OPTIMIZER, mark_module
from runner.audit.trace import Draw, Trace, trace_draws
from runner.errors import ConfigError, RunnerError
from runner.flags import trace_flags
from runner.keys import key_shape
from runner.program import (
    Program,
    build_run_optimizer,
    hyper_shapes,
    make_parts,
    make_start,
    spread_step,
)
from runner.spec import Phase
from runner.step import Batch, State, make_step
from runner.targets import first_line

__all__ = ["trace_whole"]


def trace_whole(program: Program) -> dict[Phase, Trace]:
    """The traces of a program whose `traces` are those of its model alone.

    What `init` returns is the whole state.

    Raises:
        ConfigError: the model can't be differentiated.
    """
    with trace_flags(program.spec):
        first = _trace_start(program)
        step = _trace_step(program, first.outputs)
    return {**program.traces, Phase.INIT: first, Phase.TRAIN: step}


def _trace_start(program: Program) -> Trace:
    hypers = hyper_shapes(program.hypers)
    start = make_start(program, partial(_build_marked, program))
    return trace_draws(start, program.keys, hypers, spare=_spare(program))


def _trace_step(program: Program, state: State) -> Trace:
    def given(keys: Any, carried: Any, step: Any, part: Any) -> tuple[Any, Any]:
        return keys, carried

    found, layout = program.traces[Phase.TRAIN], program.layout
    x, y = program.microbatch, program.data.y_train
    rows = x.shape[0] * layout.own_shards
    alone = make_step(
        replace(
            make_parts(program, Phase.TRAIN),
            optimizer=partial(_build_marked, program),
            rngs=given,
            microbatches=1,
        )
    )
    step = spread_step(alone, layout)
    try:
        whole = trace_draws(
            lambda rngs, state, batch, hypers: step(state, batch, rngs, hypers),
            {name: program.keys[name] for name in found.streams},
            state,
            Batch(x.update(shape=(rows, *x.shape[1:])), _rows_of(y, rows)),
            hyper_shapes(program.hypers),
            spare=_spare(program),
        )
    except RunnerError:
        raise
    except Exception as error:
        raise ConfigError(
            "model",
            f"its gradient raised {first_line(error)}",
            fix="HYDRA_FULL_ERROR=1 shows where",
        ) from error
    draws = tuple(_put_back(whole.draws, found.draws))
    primitives = whole.primitives | found.primitives
    return replace(whole, draws=draws, outputs=found.outputs, primitives=primitives)


def _rows_of(array: np.ndarray, rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype)


def _put_back(draws: Iterable[Draw], forward: Iterable[Draw]) -> Iterator[Draw]:
    """The draws, each within the loops that it stands in.

    A gradient takes out of a loop what is the same at every turn, and so a draw whose
    key is: a hazard that only the model alone still shows. Both are of one mesh.
    """

    def meaning(draw: Draw) -> Any:
        return draw.stream, draw.ops, draw.path, draw.call, draw.use, draw.untraced

    within = {meaning(draw): draw.within for draw in forward}
    for draw in draws:
        around = within.get(meaning(draw), ())
        yield replace(draw, within=max(draw.within, around, key=len))


def _spare(program: Program) -> Any:
    return key_shape(program.plan.impl)


def _build_marked(
    program: Program, hypers: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, with a path of its own for what it draws."""
    optimizer = build_run_optimizer(program.spec, hypers)

    def init(params: Any) -> Any:
        with jax.named_scope(mark_module(OPTIMIZER)):
            return optimizer.init(params)

    def update(*args: Any, **more: Any) -> Any:
        with jax.named_scope(mark_module(OPTIMIZER)):
            return optimizer.update(*args, **more)

    return optax.GradientTransformationExtraArgs(init, update)
