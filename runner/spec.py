# SPDX-License-Identifier: Apache-2.0
"""The frozen description of a run, and the rules it must keep. No JAX.

`parse_spec` turns the plain mapping that Hydra composed into a `RunSpec`: the
types come from the dataclass hints (see `runner.parse`), the rules that join
several fields stand at the end of this file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

from runner.errors import ConfigError, UnknownStreamError, did_you_mean
from runner.inputs import InputSpec, check_input
from runner.parse import (
    Bounds,
    Count,
    Fraction,
    Frozen,
    Natural,
    Node,
    Positive,
    Rate,
    Seed,
    Whole,
    build_dataclass,
)

__all__ = [
    "HAZARD_CODES",
    "ArraysSpec",
    "CheckpointSpec",
    "ClassificationSpec",
    "Coordinate",
    "CsvSpec",
    "DataSpec",
    "Derive",
    "Determinism",
    "DigitsSpec",
    "DistributedSpec",
    "EvalSpec",
    "Impl",
    "MeshSpec",
    "MnistSpec",
    "NoDataSpec",
    "Phase",
    "ProbeSpec",
    "RegressionSpec",
    "RngSpec",
    "Rule",
    "RunSpec",
    "SinksSpec",
    "Strategy",
    "StreamKind",
    "StreamSpec",
    "TaskSpec",
    "TensorboardSpec",
    "TerminalSpec",
    "TrainSpec",
    "WandbSpec",
    "parse_spec",
]

HAZARD_CODES = tuple(f"R{n:03d}" for n in range(1, 16))


class Impl(StrEnum):
    """A PRNG implementation of JAX."""

    THREEFRY2X32 = "threefry2x32"
    RBG = "rbg"
    UNSAFE_RBG = "unsafe_rbg"


class Determinism(StrEnum):
    """How much of a run's bits is promised: what holds anyway, or all or no run."""

    DEFAULT = "default"
    STRICT = "strict"


class Phase(StrEnum):
    """A part of a run with keys of its own."""

    INIT = "init"
    TRAIN = "train"
    EVAL = "eval"
    SAMPLE = "sample"


class Derive(StrEnum):
    """How a stream's key comes from its root key."""

    NAME = "name"
    SPLIT = "split"
    ROOT = "root"


class Rule(StrEnum):
    """How a coordinate enters a stream's key."""

    FOLD_IN = "fold_in"
    CARRY = "carry"
    SPLIT = "split"


class Strategy(StrEnum):
    """How a program is spread over a mesh."""

    NONE = "none"
    JIT = "jit"
    SHARD_MAP = "shard_map"
    EXACT = "exact"


class StreamKind(StrEnum):
    """Where a stream is drawn: in the compiled program, or on the host."""

    JAX = "jax"
    HOST = "host"


class Coordinate(StrEnum):
    """A number that a stream's key may depend on.

    `process` is of host streams, and changes no key: each process reads its own part of
    one order, whatever their number is.
    """

    STEP = "step"
    EPOCH = "epoch"
    MICROBATCH = "microbatch"
    PROCESS = "process"


_COORDINATES: Mapping[str, Coordinate] = {str(c): c for c in Coordinate}


@dataclass(frozen=True)
class StreamSpec:
    """One entry of `rng.streams`.

    `per` lists coordinates and axes of the mesh in the order in which they enter the
    key; what is not listed is shared. `derive` is `root` by default for a stream with
    a `seed` of its own, else `name`.
    """

    phases: tuple[Phase, ...] = (Phase.TRAIN,)
    per: Mapping[str, Rule] = field(default_factory=Frozen)
    kind: StreamKind = StreamKind.JAX
    seed: Seed | None = None
    derive: Derive | None = None

    def __post_init__(self) -> None:
        named = {_COORDINATES.get(name, name): r for name, r in self.per.items()}
        object.__setattr__(self, "per", Frozen(named))

    @property
    def derivation(self) -> Derive:
        """The `derive` in force."""
        return self.derive or (Derive.NAME if self.seed is None else Derive.ROOT)


@dataclass(frozen=True)
class RngSpec:
    """`rng`: where every random number of the run comes from."""

    seed: Seed = 0
    impl: Impl = Impl.THREEFRY2X32
    partitionable: bool = True
    fix_separator: bool = True
    fallback: Literal["error", "params"] = "error"
    observe: bool = False
    allow: tuple[str, ...] = ()
    streams: Mapping[str, StreamSpec] = field(default_factory=Frozen)


@dataclass(frozen=True)
class DataSpec:
    """What every data set answers to.

    `shuffle` and `split` name host streams: the order of each epoch, and the
    choice of test rows where the source has no split of its own. `shuffle: null`
    reads the rows as they stand.
    """

    batch_size: Count = 128
    shuffle: str | None = "shuffle"


@dataclass(frozen=True)
class DigitsSpec(DataSpec):
    """scikit-learn's 1,797 images of 8 x 8, ten classes; ships with the package."""

    name: Literal["digits"] = "digits"
    test_fraction: Fraction = 0.2
    split: str = "split"


@dataclass(frozen=True)
class ArraysSpec(DataSpec):
    """Arrays of anyone's: an `.npz`, or `.npy` inputs with `.npy` targets.

    An `.npz` holds `x_train, y_train, x_test, y_test`, or `x, y` to be split.
    """

    name: Literal["arrays"] = "arrays"
    path: str = ""
    target_path: str | None = None
    test_fraction: Fraction = 0.2
    split: str = "split"


@dataclass(frozen=True)
class MnistSpec(DataSpec):
    """The four idx files of MNIST (or one of its relatives), gzipped or not.

    `train_rows` takes the first so many rows to train on, and leaves the others out.
    """

    name: Literal["mnist"] = "mnist"
    path: str = ""
    train_rows: Count | None = None


@dataclass(frozen=True)
class CsvSpec(DataSpec):
    """A table of numbers with a header; one column is the target."""

    name: Literal["csv"] = "csv"
    path: str = ""
    target: str = ""
    standardize: bool = True
    test_fraction: Fraction = 0.2
    split: str = "split"


@dataclass(frozen=True)
class NoDataSpec:
    """No rows: for a probe, whose task declares the arrays."""

    batch_size: ClassVar[int] = 1
    shuffle: ClassVar[str | None] = None

    name: Literal["none"] = "none"


@dataclass(frozen=True)
class ClassificationSpec:
    """Softmax cross-entropy over integer labels."""

    metrics: ClassVar[Mapping[str, str]] = {"accuracy": "max", "loss": "min"}

    name: Literal["classification"] = "classification"
    label_smoothing: Rate = 0.0


@dataclass(frozen=True)
class RegressionSpec:
    """Mean squared error."""

    metrics: ClassVar[Mapping[str, str]] = {"loss": "min", "mae": "min"}

    name: Literal["regression"] = "regression"


@dataclass(frozen=True)
class ProbeSpec:
    """The model is called with declared arrays; all that comes out is kept.

    Without `loss`: one call, in train or eval `mode`. With it, `train.steps` updates
    against `targets`, then a call in eval mode.
    """

    metrics: ClassVar[Mapping[str, str]] = {"loss": "min"}

    name: Literal["probe"] = "probe"
    inputs: tuple[InputSpec, ...] = ()
    mode: Literal["train", "eval"] = "train"
    loss: Literal["squared_error", "cross_entropy"] | None = None
    targets: InputSpec | None = None

    @property
    def arrays(self) -> dict[str, InputSpec]:
        """Inputs and targets by config path, in the order in which they are made."""
        arrays = {f"task.inputs[{i}]": spec for i, spec in enumerate(self.inputs)}
        if self.targets is not None:
            arrays["task.targets"] = self.targets
        return arrays


TaskSpec = ClassificationSpec | RegressionSpec | ProbeSpec
DataChoice = DigitsSpec | ArraysSpec | MnistSpec | CsvSpec | NoDataSpec


@dataclass(frozen=True)
class TrainSpec:
    """`train`: the loop.

    `steps_per_call` is the number of steps in one call of the compiled program;
    it never changes a bit. `accumulation_steps` cuts each batch into that many
    microbatches. `clip_norm` bounds the global norm of the gradient. `max_norm`
    bounds the norm of each unit's incoming weights (Srivastava et al. 2014, §5.1).
    `l1` and `l2` are factors of the sums of |w| and w^2 over all kernels, which are
    added to the loss.
    `matmul_precision` is that of products on an accelerator (null: as JAX is set).
    `compile_cache` is a directory, `auto` (the user's cache) or null.
    """

    steps: Count = 1000
    steps_per_call: Count | Literal["auto"] = "auto"
    accumulation_steps: Count = 1
    clip_norm: Positive | None = None
    max_norm: Positive | None = None
    l1: Natural | None = None
    l2: Natural | None = None
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    matmul_precision: Literal["default", "high", "highest"] | None = None
    compile_cache: str | None = "auto"


@dataclass(frozen=True)
class EvalSpec:
    """`eval`: when to evaluate, and which metric counts.

    `every` is in steps (null: at the end alone), `batch_size` in rows (null: as
    large as 1,024). The first `train_rows` rows to train on (`all`, or null: none) are
    evaluated, too, for metrics called `train_...`. `metric` is the objective (null: the
    task's first), whose best value is kept in the record. With `patience`, the run
    stops after that many evaluations in a row that did not better it by more than
    `min_delta`.
    """

    every: Count | None = None
    batch_size: Count | None = None
    train_rows: Count | Literal["all"] | None = None
    metric: str | None = None
    patience: Count | None = None
    min_delta: Natural = 0.0


@dataclass(frozen=True)
class TerminalSpec:
    """`sinks.terminal`: a live display, plain lines, or neither."""

    mode: Literal["auto", "rich", "plain", "disabled"] = "auto"


@dataclass(frozen=True)
class WandbSpec:
    """`sinks.wandb`: a mirror of the record in Weights & Biases.

    `mode: auto` is what the environment's WANDB_MODE says, else offline. `every`
    is the number of train steps between two rows.
    """

    mode: Literal["auto", "offline", "online", "disabled"] = "auto"
    project: str = "runner"
    entity: str | None = None
    group: str | None = None
    every: Count = 10


@dataclass(frozen=True)
class TensorboardSpec:
    """`sinks.tensorboard`: event files in the run directory (an extra)."""

    mode: Literal["enabled", "disabled"] = "disabled"
    every: Count = 10


@dataclass(frozen=True)
class SinksSpec:
    """`sinks`: where records go besides the run directory."""

    terminal: TerminalSpec = TerminalSpec()
    wandb: WandbSpec = WandbSpec()
    tensorboard: TensorboardSpec = TensorboardSpec()


@dataclass(frozen=True)
class DistributedSpec:
    """`mesh.distributed`: the processes that share a run.

    Process 0 listens at `coordinator_address` (`host:port`). Without it and without a
    `process_id`, this one launches the others on this machine.
    """

    num_processes: Count
    coordinator_address: str | None = None
    process_id: Whole | None = None


@dataclass(frozen=True)
class MeshSpec:
    """`mesh`: the devices under named axes, and what is cut along which.

    `rules` map logical axes of arrays (`batch` of the rows, and those that a model
    names by `flax.linen.with_logical_partitioning`) to axes of the mesh. With
    `host_devices`, the CPU is taken for so many devices of each process. A process is
    waited for `connect_timeout` seconds at the start; later, one that is silent for
    `heartbeat_timeout` seconds is taken for lost.
    """

    axes: Mapping[str, Count] = field(default_factory=Frozen)
    strategy: Strategy = Strategy.NONE
    rules: Mapping[str, str | None] = field(default_factory=Frozen)
    host_devices: Count | None = None
    distributed: DistributedSpec | Literal["auto"] | None = None
    connect_timeout: Annotated[float, Bounds(1, 86400)] = 60.0
    heartbeat_timeout: Annotated[float, Bounds(3, 86400)] = 10.0


@dataclass(frozen=True)
class CheckpointSpec:
    """`checkpoint`: what a run survives by.

    The state is saved at the end and when a signal stops the run; besides, `every` so
    many steps, or (`auto`) when the last one is ten minutes old. The `keep` newest
    stay, and the `keep_best` best by the objective, which are saved as they are
    found. `digest_every` is the number of steps between two records of the state's
    fingerprint (null: at the end alone).
    """

    every: Count | Literal["auto"] | None = "auto"
    keep: Count = 2
    keep_best: Whole = 0
    digest_every: Count | None = 100


@dataclass(frozen=True)
class RunSpec:
    """All that a run depends on."""

    model: Node
    optimizer: Node
    experiment: str = "default"
    seed: Seed = 0
    trusted: tuple[str, ...] = ()
    determinism: Determinism = Determinism.DEFAULT
    rng: RngSpec = RngSpec()
    data: DataChoice = DigitsSpec()
    task: TaskSpec = ClassificationSpec()
    train: TrainSpec = TrainSpec()
    eval: EvalSpec = EvalSpec()
    mesh: MeshSpec = MeshSpec()
    sinks: SinksSpec = SinksSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()

    @property
    def objective(self) -> str:
        """The metric that counts."""
        return self.eval.metric or next(iter(self.task.metrics))


def parse_spec(config: Mapping[str, Any]) -> RunSpec:
    """Checks a composed, resolved config and freezes it.

    Args:
        config: Plain data: mappings, sequences, scalars, None.

    Raises:
        ConfigError: a leaf breaks a rule; the message says which, and the fix.
    """
    spec = build_dataclass(RunSpec, config)
    for check in (_check_trusted, _check_streams, _check_host_streams):
        check(spec)
    for check in (_check_nodes, _check_rates, _check_task, _check_probe):
        check(spec)
    _check_batches(spec)
    _check_mesh(spec)
    return spec


_OURS = ("conf", "hydra_plugins", "models", "runner", "tests")


def _check_trusted(spec: RunSpec) -> None:
    for i, package in enumerate(spec.trusted):
        path = f"trusted[{i}]"
        if not all(part.isidentifier() for part in package.split(".")):
            raise ConfigError(path, "must be the import name of a package", got=package)
        if package.split(".")[0] in _OURS:
            raise ConfigError(
                path,
                "names a package of the runner itself",
                got=package,
                allowed="`models.X` in a config always means the runner's models",
                fix="Put yours in a package with a name of its own (mylab/models.py)",
            )


def _check_streams(spec: RunSpec) -> None:
    for i, code in enumerate(spec.rng.allow):
        if code not in HAZARD_CODES:
            raise ConfigError(
                f"rng.allow[{i}]",
                "not a hazard code",
                got=code,
                allowed=f"Codes: {HAZARD_CODES[0]} to {HAZARD_CODES[-1]}",
            )
    for name, stream in spec.rng.streams.items():
        path = f"rng.streams.{name}"
        if name in set(Phase):
            raise ConfigError(
                path,
                "a phase's name would meet that phase's keys",
                got=name,
                fix="Name the stream after what it is used for",
            )
        _check_names(spec, f"{path}.per", stream)
        if stream.kind is StreamKind.HOST:
            _check_host_stream(path, stream)
        rules = list(stream.per.values())
        carried = [c for c, rule in stream.per.items() if rule is Rule.CARRY]
        if carried not in ([], [Coordinate.STEP]):
            raise ConfigError(
                f"{path}.per", "only `step` can be carried", got=_plain(stream.per)
            )
        if Rule.CARRY in rules[1:]:
            raise ConfigError(
                f"{path}.per",
                "a carried `step` must come first",
                got=_plain(stream.per),
            )
        if stream.derive is Derive.SPLIT and stream.seed is not None:
            raise ConfigError(
                f"{path}.derive",
                "a stream with a seed of its own has no siblings to split with",
                got="split",
                fix=f"Remove {path}.seed, or say derive: name",
            )


def _check_names(spec: RunSpec, path: str, stream: StreamSpec) -> None:
    """What a key may differ by: a coordinate, or an axis of the mesh."""
    axes, known = spec.mesh.axes, [*_COORDINATES, *spec.mesh.axes]
    if stream.kind is StreamKind.JAX:
        known.remove(Coordinate.PROCESS)
    for name, rule in stream.per.items():
        if name not in known:
            raise ConfigError(
                path,
                "not a choice",
                got=str(name),
                allowed=f"Choices: {', '.join(known)}",
                fix="Name an axis of the mesh that goes over processes"
                if name is Coordinate.PROCESS
                else did_you_mean(name, known)
                or ("" if axes else "Axes are those of a mesh: set mesh=data8"),
            )
        if rule is Rule.SPLIT and name not in axes:
            raise ConfigError(
                path,
                "only an axis of the mesh can be split over",
                got=_plain(stream.per),
                allowed=f"Axes: {', '.join(axes) or 'none'}",
            )


def _check_host_stream(path: str, stream: StreamSpec) -> None:
    known = (Coordinate.EPOCH, Coordinate.PROCESS)
    if any(c not in known for c in stream.per):
        raise ConfigError(
            f"{path}.per",
            "a host stream can differ by epoch and process alone",
            got=_plain(stream.per),
            fix=f"Set {path}.per=[epoch] or []",
        )
    if Rule.CARRY in stream.per.values() or stream.derive not in (None, Derive.NAME):
        raise ConfigError(
            path,
            "a host stream is seeded by its name and epoch, with no other rule",
            fix=f"Remove {path}.derive and rules in {path}.per",
        )


def _check_host_streams(spec: RunSpec) -> None:
    split_name = getattr(spec.data, "split", None)
    for use in ("shuffle", "split"):
        name = getattr(spec.data, use, None)
        if name is None:
            continue
        stream = spec.rng.streams.get(name)
        if stream is None:
            raise UnknownStreamError(
                f"data.{use}",
                "not a declared stream",
                got=name,
                allowed=f"Declared: {', '.join(sorted(spec.rng.streams)) or 'none'}",
                fix=did_you_mean(name, spec.rng.streams)
                or f"Set +rng.streams.{name}={{kind: host}}",
            )
        if stream.kind is not StreamKind.HOST:
            raise ConfigError(
                f"rng.streams.{name}.kind",
                "rows are ordered on the host",
                got=stream.kind.value,
                fix=f"Set rng.streams.{name}.kind=host",
            )
    if spec.data.shuffle is not None and spec.data.shuffle == split_name:
        raise ConfigError(
            "data.shuffle",
            "the stream that chooses the test rows can't order the others, too",
            got=spec.data.shuffle,
            fix="Give each a stream of its own",
        )
    if spec.rng.streams and getattr(spec.data, "split", None):
        split = spec.rng.streams[spec.data.split]  # type: ignore[union-attr]
        if Coordinate.EPOCH in split.per:
            raise ConfigError(
                f"rng.streams.{spec.data.split}.per",  # type: ignore[union-attr]
                "test rows are chosen once, so this stream has no epoch",
                got=_plain(split.per),
                fix="Set it to []",
            )


def _check_nodes(spec: RunSpec) -> None:
    for name, inner in (("model", "module"), ("optimizer", "transform")):
        node = getattr(spec, name)
        if "_target_" not in node and "lift" not in node and inner not in node:
            raise ConfigError(
                name,
                f"must be a mapping with a `_target_`, or with one under `{inner}`",
                got=dict(node),
            )


def _check_rates(spec: RunSpec) -> None:
    for path, value in _leaves("model", spec.model):
        leaf = path.rsplit(".", 1)[-1]
        if leaf != "rate" and not leaf.endswith("dropout_rate"):
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1:
            raise ConfigError(
                path, "must be a number from 0 to 1", got=value, allowed="0 keeps all"
            )


def _check_task(spec: RunSpec) -> None:
    metrics = spec.task.metrics
    if spec.eval.metric is not None and spec.eval.metric not in metrics:
        raise ConfigError(
            "eval.metric",
            f"not computed by task {spec.task.name}",
            got=spec.eval.metric,
            allowed=f"Computed: {', '.join(sorted(metrics))}",
            fix=did_you_mean(spec.eval.metric, metrics),
        )
    if spec.eval.patience is not None and spec.eval.every is None:
        raise ConfigError(
            "eval.patience",
            "needs evaluations before the end",
            got=spec.eval.patience,
            fix="Set eval.every to a number of steps",
        )


def _check_probe(spec: RunSpec) -> None:
    task = spec.task
    if isinstance(task, ProbeSpec) != isinstance(spec.data, NoDataSpec):
        is_probe = isinstance(task, ProbeSpec)
        raise ConfigError(
            "data.name",
            "a probe reads no rows" if is_probe else f"{task.name} needs rows",
            got=spec.data.name,
            fix="Set data=none" if is_probe else "Set data=digits, or task=probe",
        )
    if not isinstance(task, ProbeSpec):
        return
    for path, declared in task.arrays.items():
        check_input(declared, path=path)
        if declared.stream is not None:
            _check_source(spec, declared.stream, path)
    if (task.loss is None) != (task.targets is None):
        has, lacks = sorted(("loss", "targets"), key=lambda n: getattr(task, n) is None)
        rule, fix = f"{has} needs {lacks}, too", f"Set task.{lacks}, or leave both out"
        raise ConfigError(f"task.{lacks}", rule, got=None, fix=fix)
    if task.loss is not None and task.mode != "train":
        rule = "updates are made in train mode"
        raise ConfigError("task.mode", rule, got=task.mode, fix="Remove it")
    unused = {
        "train.accumulation_steps": spec.train.accumulation_steps > 1,
        "eval.batch_size": spec.eval.batch_size is not None,
        "eval.train_rows": spec.eval.train_rows is not None,
        "eval.patience": spec.eval.patience is not None,
    }
    for path in [path for path, is_set in unused.items() if is_set]:
        raise ConfigError(path, "not for a probe", fix="Leave it as it is by default")


def _check_source(spec: RunSpec, name: str, path: str) -> None:
    stream = spec.rng.streams.get(name)
    if stream is None:
        raise UnknownStreamError(
            f"{path}.stream",
            "not a declared stream",
            got=name,
            allowed=f"Declared: {', '.join(sorted(spec.rng.streams)) or 'none'}",
            fix=did_you_mean(name, spec.rng.streams)
            or f"Set +rng.streams.{name}={{phases: [init]}}",
        )
    if stream.kind is StreamKind.HOST and stream.per:
        raise ConfigError(
            f"rng.streams.{name}.per",
            "inputs are drawn once, so this stream has no epoch",
            got=_plain(stream.per),
            fix="Set it to []",
        )
    if stream.kind is StreamKind.JAX and Phase.INIT not in stream.phases:
        raise ConfigError(
            f"rng.streams.{name}.phases",
            "must include init, where inputs are drawn",
            got=[str(phase) for phase in stream.phases],
            fix="Add init to it",
        )


def _check_batches(spec: RunSpec) -> None:
    rows, parts = spec.data.batch_size, spec.train.accumulation_steps
    if rows % parts:
        raise ConfigError(
            "train.accumulation_steps",
            f"must divide data.batch_size ({rows})",
            got=parts,
            fix=f"Set data.batch_size={-(-rows // parts) * parts}",
        )
    if getattr(spec.data, "path", None) == "":
        raise ConfigError(
            "data.path",
            f"must say where the {spec.data.name} files are",
            got="",
            fix="Set data.path=/where/they/are",
        )
    if isinstance(spec.data, CsvSpec) and not spec.data.target:
        raise ConfigError(
            "data.target", "must name the target's column", got="", fix="Set it"
        )


def _leaves(path: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        parts = [(f"{path}.{key}", child) for key, child in value.items()]
    elif isinstance(value, tuple):
        parts = [(f"{path}[{i}]", child) for i, child in enumerate(value)]
    else:
        return [(path, value)]
    return [leaf for where, child in parts for leaf in _leaves(where, child)]


def _plain(values: Mapping[Any, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in values.items()}


# Coordinates, and what the ledger calls the axes of loops.
_NO_AXES = (*_COORDINATES, "condition", "scan", "vmap", "while")


def _check_mesh(spec: RunSpec) -> None:
    mesh = spec.mesh
    if mesh.strategy is Strategy.NONE:
        for name in ("axes", "rules"):
            if getattr(mesh, name):
                raise ConfigError(
                    f"mesh.{name}",
                    "needs a strategy",
                    got={**getattr(mesh, name)},
                    fix=f"Set mesh.strategy=jit, or mesh.{name}={{}}",
                )
        if mesh.distributed is not None:
            rule, fix = "needs a strategy", "Set mesh.strategy=jit, or it to null"
            raise ConfigError("mesh.distributed", rule, fix=fix)
        return
    called = (Strategy.JIT, Strategy.SHARD_MAP)
    if isinstance(spec.task, ProbeSpec) and mesh.strategy not in called:
        rule, got = "not for a probe", str(mesh.strategy)
        allowed = f"A probe takes {', '.join(called)}"
        raise ConfigError("mesh.strategy", rule, got=got, allowed=allowed)
    if isinstance(spec.task, ProbeSpec) and mesh.distributed is not None:
        rule, fix = "not for a probe", "Set mesh.distributed=null"
        raise ConfigError("mesh.distributed", rule, fix=fix)
    if not mesh.axes:
        fix = "Set +mesh.axes.data=8"
        raise ConfigError("mesh.axes", "must name at least one axis", got={}, fix=fix)
    for name in mesh.axes:
        if name in _NO_AXES:
            rule = "already has a meaning, and can't name an axis"
            raise ConfigError(f"mesh.axes.{name}", rule, got=name, fix="Rename it")
    for logical, axis in mesh.rules.items():
        if axis is not None and axis not in mesh.axes:
            raise ConfigError(
                f"mesh.rules.{logical}",
                "not an axis of the mesh",
                got=axis,
                allowed=f"Axes: {', '.join(mesh.axes)}",
                fix=did_you_mean(axis, mesh.axes),
            )
        is_whole = mesh.strategy is Strategy.SHARD_MAP
        if logical != "batch" and (is_whole or isinstance(spec.task, ProbeSpec)):
            what = "shard_map" if is_whole else "a probe"
            raise ConfigError(
                f"mesh.rules.{logical}",
                f"not for {what}: each device has whole parameters",
                got=axis,
                allowed="Rules: batch",
                fix=f"Remove it: '~mesh.rules.{logical}'",
            )
    if mesh.strategy is Strategy.EXACT:
        _check_exact(spec)


def _check_exact(spec: RunSpec) -> None:
    """Bits that do not depend on the number of devices: what that takes."""
    mesh = spec.mesh
    for logical, axis in mesh.rules.items():
        if logical != "batch" and axis is not None:
            raise ConfigError(
                f"mesh.rules.{logical}",
                "strategy exact cuts the batch alone",
                got=axis,
                fix=f"Remove it, or set mesh.strategy={Strategy.JIT}",
            )
    if mesh.rules.get("batch") is None:
        fix = f"Set mesh.rules.batch={next(iter(mesh.axes))}"
        rule = "strategy exact must know which axis the microbatches are spread over"
        raise ConfigError("mesh.rules.batch", rule, got=None, fix=fix)
    if spec.rng.observe:
        rule = "the keys of a program that is exact over meshes can't be observed"
        fix = f"Set mesh.strategy={Strategy.JIT}, or rng.observe=false"
        raise ConfigError("rng.observe", rule, got=True, fix=fix)
