# SPDX-License-Identifier: Apache-2.0
"""`runner.data`: every source from real or damaged files, and the order of rows."""

import contextlib
import gzip
import hashlib
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.data import BatchOrder, Dataset, load_data
from runner.data.order import epoch_order
from runner.errors import DataError
from runner.spec import ArraysSpec, CsvSpec, DataSpec, DigitsSpec, MnistSpec

REPOSITORY = Path(__file__).parents[1]
REAL = Path(os.environ.get("RUNNER_DATA_DIR", REPOSITORY.parent / "shared" / "data"))
MNIST = REAL / "mnist"

needs_mnist = pytest.mark.skipif(
    not MNIST.is_dir(), reason=f"no {MNIST}: set RUNNER_DATA_DIR to where mnist/ is"
)


def generator(*key: int) -> np.random.Generator:
    sequence = np.random.SeedSequence(0, spawn_key=key)
    return np.random.Generator(np.random.Philox(sequence))


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def load(spec: DataSpec) -> Dataset:
    return load_data(spec, split=generator(1))


def refusal(spec: DataSpec) -> str:
    with pytest.raises(DataError) as caught:
        load(spec)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{caught.value.path}: ")
    return text


# ---- the split, the digest, the imports


def test_a_data_set_is_a_function_of_file_spec_and_generator() -> None:
    first, again = load(DigitsSpec()), load(DigitsSpec())
    other = load_data(DigitsSpec(), split=generator(2))
    smaller = load(DigitsSpec(test_fraction=0.1))
    assert first.digest() == again.digest()
    assert len({first.digest(), other.digest(), smaller.digest()}) == 3


def test_permutations_stay_as_they_are() -> None:
    # NumPy may change them (NEP 19). Then old runs do not replay: say so, loudly.
    assert generator(1).permutation(10).tolist() == [8, 0, 5, 7, 4, 6, 9, 2, 1, 3]
    order = epoch_order(generator(1), rows=60_000)
    assert hashlib.sha256(order.astype("<i4")).hexdigest()[:16] == "e2f29a5c057b61d9"


def test_test_rows_are_the_last_of_one_permutation_in_the_order_of_the_file(
    tmp_path: Path,
) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(10.0), y=np.arange(10.0))
    data = load(ArraysSpec(path=str(tmp_path / "a.npz"), test_fraction=0.25))
    chosen = np.sort(generator(1).permutation(10)[-2:])  # round(2.5) is 2
    np.testing.assert_array_equal(data.x_test, chosen)
    np.testing.assert_array_equal(data.x_train, np.setdiff1d(np.arange(10), chosen))
    np.testing.assert_array_equal(data.x_train, data.y_train)
    np.testing.assert_array_equal(data.x_test, data.y_test)


@pytest.mark.parametrize(
    ("rows", "fraction", "message"),
    [
        (3, 0.1, "leaves 0 of 3 rows to be tested on, 3 to train (got 0.1)"),
        (3, 0.9, "leaves 3 of 3 rows to be tested on, 0 to train (got 0.9)"),
        (1, 0.5, "leaves 0 of 1 rows to be tested on, 1 to train (got 0.5)"),
    ],
)
def test_each_part_has_a_row(
    tmp_path: Path, rows: int, fraction: float, message: str
) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones(rows), y=np.ones(rows))
    spec = ArraysSpec(path=str(tmp_path / "a.npz"), test_fraction=fraction)
    assert f"data.test_fraction: {message}. Each part needs a row." in refusal(spec)


def test_a_source_without_test_rows_needs_a_generator() -> None:
    with pytest.raises(DataError, match=r"data\.split: .* a stream must choose them"):
        load_data(DigitsSpec(), split=None)


def test_the_digest_sees_dtype_shape_bytes_and_place() -> None:
    x, y = np.zeros((2, 6), np.float32), np.zeros(2, np.int32)
    folded, real = x.reshape(2, 2, 3), y.view(np.float32)
    sets = [
        Dataset(x, y, x, y, 1),
        Dataset(folded, y, folded, y, 1),
        Dataset(x, real, x, real, None),
        Dataset(x + 1, y, x, y, 1),
        Dataset(x, y + 1, x, y, 1),
        Dataset(x, y, x + 1, y, 1),
        Dataset(x, y, x, y + 1, 1),
    ]
    digests = [data.digest() for data in sets]
    assert len(set(digests)) == len(sets)
    assert {len(digest) for digest in digests} == {64}
    fortran = np.asfortranarray(x)
    assert Dataset(fortran, y, fortran, y, 1).digest() == digests[0]


def test_digits_load_without_jax_and_scikit_learn() -> None:
    program = (
        "import sys, numpy as np\n"
        "from runner.data import load_data\n"
        "from runner.spec import DigitsSpec\n"
        "load_data(DigitsSpec(), split=np.random.default_rng(0))\n"
        "print(sorted({'jax', 'flax', 'sklearn', 'scipy'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_a_spec_without_a_loader_is_a_bug() -> None:
    with pytest.raises(TypeError, match="no loader for DataSpec"):
        load(DataSpec())


# ---- digits


def test_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    ours, theirs = load(DigitsSpec()), datasets.load_digits()
    order = generator(1).permutation(1797)
    train, test = np.sort(order[:-359]), np.sort(order[-359:])
    images = (theirs.images / 16).astype(np.float32)
    np.testing.assert_array_equal(ours.x_train, images[train], strict=True)
    np.testing.assert_array_equal(ours.x_test, images[test], strict=True)
    labels = theirs.target.astype(np.int32)
    np.testing.assert_array_equal(ours.y_train, labels[train], strict=True)
    np.testing.assert_array_equal(ours.y_test, labels[test], strict=True)
    assert ours.classes == 10
    assert (ours.x_train.min(), ours.x_train.max()) == (0, 1)


def fake_sklearn(folder: Path, content: bytes | None) -> None:
    data = folder / "sklearn" / "datasets" / "data"
    data.mkdir(parents=True)
    (folder / "sklearn" / "__init__.py").write_text("raise RuntimeError('imported')")
    if content is not None:
        (data / "digits.csv.gz").write_bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "data.name: can't be read: No such file or directory"),
        (packed(b"1,2,3\n"), "the images within scikit-learn are damaged"),
        (packed(b"<html>"), "the images within scikit-learn are damaged"),
        (packed(b"1,2,3\n")[:-1], "digits.csv.gz ends within gzip data"),
    ],
)
def test_digits_damaged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
    message: str,
) -> None:
    fake_sklearn(tmp_path, content)
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert message in refusal(DigitsSpec())


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = refusal(DigitsSpec())
    assert "is not installed (got 'digits'). Run: pip install scikit-learn." in text


# ---- paths


def npz(file: Path, **arrays: Any) -> ArraysSpec:
    np.savez(file, **arrays)
    return ArraysSpec(path=str(file))


ROWS = {"x": np.eye(6), "y": np.arange(6) % 3}


def test_paths_are_relative_to_where_we_stand_and_know_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(npz(tmp_path / "a.npz", **ROWS)).digest()
    monkeypatch.chdir(tmp_path)
    assert load(ArraysSpec(path="a.npz")).digest() == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    assert load(ArraysSpec(path="~/a.npz")).digest() == expected


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "moons.npz"
    npz(file, **ROWS)
    near = refusal(ArraysSpec(path=str(tmp_path / "mons.npz")))
    assert "data.path: no such file (got " in near
    assert f"Looked for {tmp_path / 'mons.npz'}. Did you mean 'moons.npz'?" in near
    under = refusal(ArraysSpec(path=str(file / "x")))
    assert "data.path: no such file" in under
    assert "no such file" in refusal(ArraysSpec(path="a\0b"))
    assert "must be a file, and is a directory" in refusal(
        CsvSpec(path=str(tmp_path), target="y")
    )
    assert "must be a directory, and is a file" in refusal(MnistSpec(path=str(file)))
    assert "can't be read: File name too long" in refusal(ArraysSpec(path="x" * 999))


def test_special_files_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    text = refusal(CsvSpec(path=str(tmp_path / "pipe"), target="y"))
    assert "must be a file, and is a special file" in text


def test_a_file_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = npz(tmp_path / "a.npz", **ROWS)

    def refuse(*args: Any) -> None:  # root may read everything, so no chmod here
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "data.path: can't be read: Permission denied (got" in refusal(spec)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    spec = npz(tmp_path / "a.npz", **ROWS)
    tmp_path.chmod(0)
    try:
        assert "data.path: can't be read: Permission denied" in refusal(spec)
    finally:
        tmp_path.chmod(0o700)


# ---- mnist


def idx(array: np.ndarray) -> bytes:
    shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes()


STEMS = {
    "train-images-idx3-ubyte": idx(np.arange(5 * 4 * 3).reshape(5, 4, 3)),
    "train-labels-idx1-ubyte": idx(np.array([0, 1, 2, 1, 0])),
    "t10k-images-idx3-ubyte": idx(np.arange(2 * 4 * 3).reshape(2, 4, 3) + 200),
    "t10k-labels-idx1-ubyte": idx(np.array([3, 1])),
}


def mnist(folder: Path, **changed: bytes | None) -> MnistSpec:
    """Writes a small relative of MNIST; `train_images=...` puts other bytes there."""
    for name, content in STEMS.items():
        key = "_".join(name.split("-")[:2])
        new = changed.get(key, content)
        if new is not None:
            (folder / name).write_bytes(new)
    return MnistSpec(path=str(folder))


@needs_mnist
def test_mnist_itself() -> None:
    data = load_data(MnistSpec(path=str(MNIST)), split=None)
    assert data.x_train.shape == (60_000, 28, 28)
    assert data.x_test.shape == (10_000, 28, 28)
    assert (data.x_train.dtype, data.y_train.dtype) == (np.float32, np.int32)
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)
    assert data.classes == 10
    assert data.y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.y_test[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(data.y_train).tolist() == counts
    mean, deviation = data.x_train.mean(), data.x_train.std()  # known to everyone
    assert (round(float(mean), 4), round(float(deviation), 4)) == (0.1307, 0.3081)


def test_mnist_takes_the_first_rows(tmp_path: Path) -> None:
    whole = load_data(mnist(tmp_path), split=None)
    cut = load_data(replace(mnist(tmp_path), train_rows=3), split=None)
    np.testing.assert_array_equal(cut.x_train, whole.x_train[:3], strict=True)
    np.testing.assert_array_equal(cut.y_train, whole.y_train[:3], strict=True)
    np.testing.assert_array_equal(cut.x_test, whole.x_test, strict=True)
    assert cut.classes == whole.classes
    text = refusal(replace(mnist(tmp_path), train_rows=6))
    assert text == (
        "data.train_rows: must not exceed the 5 rows to train on (got 6). "
        "Set data.train_rows=null for all of them."
    )


@needs_mnist
def test_mnist_truncated(tmp_path: Path) -> None:
    for file in MNIST.iterdir():
        (tmp_path / file.name).symlink_to(file)
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    content = labels.read_bytes()
    labels.unlink()
    labels.write_bytes(content[:4000])
    text = refusal(MnistSpec(path=str(tmp_path)))
    assert "data.path: t10k-labels-idx1-ubyte.gz ends within gzip data" in text


@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize("form", ["gzip", "plain", "plain, though named .gz"])
def test_mnist_names(tmp_path: Path, dot: str, form: str) -> None:
    for name, content in STEMS.items():
        file = tmp_path / name.replace("-idx", f"{dot}idx")
        if form != "plain":
            file = Path(f"{file}.gz")
        file.write_bytes(packed(content) if form == "gzip" else content)
    data = load_data(MnistSpec(path=str(tmp_path)), split=None)
    expected = np.arange(60, dtype=np.float32).reshape(5, 4, 3) / np.float32(255)
    np.testing.assert_array_equal(data.x_train, expected, strict=True)
    assert data.y_test.tolist() == [3, 1]
    assert data.classes == 4


def test_mnist_absent(tmp_path: Path) -> None:
    text = refusal(mnist(tmp_path, train_labels=None, t10k_images=None))
    assert text.startswith(
        "data.path: no train-labels-idx1-ubyte and no t10k-images-idx3-ubyte there "
        "(got "
    )
    assert f"Looked in {tmp_path}. Put the four files of the MNIST database" in text
    text = refusal(MnistSpec(path=str(tmp_path / "absent")))
    assert "no such directory" in text
    assert "Put the four files of the MNIST database there" in text


IMAGES = STEMS["train-images-idx3-ubyte"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must start with two zero bytes, as idx (got '')"),
        (b"<html>", "must start with two zero bytes, as idx (got '3c 68 74 6d')"),
        (b"\0\0\x0d" + IMAGES[3:], "must hold unsigned bytes, kind 0x08 (got '0x0d')"),
        (b"\0\0\x08\x01" + IMAGES[4:], "must have 3 dimensions (got 1)"),
        (IMAGES[:10], "ends within its 16-byte header (got 10)"),
        (IMAGES[:-1], "ends before its 60 values (got 59)"),
        (IMAGES + b"!", "goes on after its 60 values (got 61)"),
        (idx(np.zeros((0, 4, 3))), "must not be empty (got (0, 4, 3))"),
        (idx(np.zeros((4, 4, 3))), "must have equal numbers of rows (got (4, 5))"),
        (idx(np.zeros((5, 4, 4))), "images must be of one size (got ((4, 4), (4, 3)))"),
        (
            b"\0\0\x08\x03" + b"\xff" * 12,
            "ends before its 79228162458924105385300197375",
        ),
        (packed(IMAGES)[:-4], "ends within gzip data"),
        (packed(IMAGES) + b"!", "holds damaged gzip data"),
        (packed(IMAGES)[:10] + b"\xff" * 20, "holds damaged gzip data"),
        (packed(IMAGES)[:-8] + bytes(8), "holds damaged gzip data"),
    ],
)
def test_mnist_damaged(tmp_path: Path, content: bytes, message: str) -> None:
    text = refusal(mnist(tmp_path, train_images=content))
    assert text.startswith("data.path: ")
    assert message in text
    assert "train-images-idx3-ubyte" in text or "train and test images" in text


# ---- arrays


def test_an_npz_with_its_own_test_rows_draws_nothing(tmp_path: Path) -> None:
    spec = npz(
        tmp_path / "a.npz",
        x_train=np.arange(6, dtype=np.uint8).reshape(3, 2),
        y_train=np.array([0, 4, 1]),
        x_test=np.array([[7, 8]], dtype=np.uint8),
        y_test=np.array([2]),
        names=np.array(["what", "else"], dtype=object),  # neither needed nor read
    )
    data = load_data(spec, split=None)
    assert data.x_train.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert data.x_test.tolist() == [[7, 8]]
    assert data.y_train.tolist() == [0, 4, 1]
    assert (data.x_train.dtype, data.y_train.dtype) == (np.float32, np.int32)
    assert data.classes == 5


@pytest.mark.parametrize(
    ("dtype", "expected", "classes"),
    [
        ("?", "int32", 2),
        ("u1", "int32", 2),
        (">i8", "int32", 2),
        ("f2", "float32", None),
        (">f8", "float32", None),
    ],
)
def test_targets_by_dtype(
    tmp_path: Path, dtype: str, expected: str, classes: int | None
) -> None:
    y = np.array([[0], [1], [0], [1]], dtype=dtype)
    np.save(tmp_path / "x.npy", np.asfortranarray(np.eye(4)))
    np.save(tmp_path / "y.npy", y)
    spec = ArraysSpec(path=str(tmp_path / "x.npy"), target_path=str(tmp_path / "y.npy"))
    data = load(spec)
    assert data.y_train.dtype == expected
    assert data.y_train.shape == (3, 1)
    assert data.classes == classes
    assert data.x_train.dtype == np.float32
    rows = np.concatenate([data.x_train, data.x_test])
    targets = np.concatenate([data.y_train, data.y_test])
    np.testing.assert_array_equal(targets[:, 0], rows.argmax(axis=1) % 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": np.ones((5, 2))}, "x and y in a.npz must have equal numbers of rows"),
        ({"x": np.full((6, 2), np.nan)}, "x in a.npz must be finite"),
        ({"x": np.full((6, 2), 1e300)}, "within float32, at [0, 0] (got 1e+300)"),
        ({"y": np.array([0, 1, 2, np.inf, 4, 5])}, "at [3] (got inf)"),
        ({"x": np.ones((6, 0))}, "x in a.npz must not be empty (got (6, 0))"),
        ({"x": np.ones(())}, "x in a.npz must have rows (got 1.0)"),
        ({"x": np.ones((6, 2), complex)}, "must hold real numbers (got 'complex128')"),
        ({"x": np.array(["a"] * 6)}, "x in a.npz must hold real numbers (got '<U1')"),
        ({"x": np.array([{}] * 6)}, "x in a.npz holds Python objects, and loading"),
        ({"y": np.array([0, 1, -1, 1, 0, 2])}, "labels and count from 0 (got -1)"),
        ({"y": np.array([2**31] * 6)}, "(got 2147483648). Labels: 0 to 2147483646"),
        ({"y": np.array([2**63] * 6, np.uint64)}, "(got 9223372036854775808)"),
    ],
)
def test_npz_with_unfit_arrays(
    tmp_path: Path, changed: dict[str, np.ndarray], message: str
) -> None:
    text = refusal(npz(tmp_path / "a.npz", **(ROWS | changed)))
    assert text.startswith("data.path: ")
    assert message in text


PARTS = {
    "x_train": np.ones((3, 2)),
    "y_train": np.ones(3),
    "x_test": np.ones((2, 2)),
    "y_test": np.ones(2),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_test": np.ones((3, 2))}, "x_test and y_test in a.npz must have equal"),
        ({"x_train": np.ones((3, 4))}, "(got (('float32', 4), ('float32', 2)))"),
        ({"y_train": np.array([1, 2, 3])}, "(got (('int32',), ('float32',)))"),
    ],
)
def test_npz_with_unlike_parts(
    tmp_path: Path, changed: dict[str, np.ndarray], message: str
) -> None:
    assert message in refusal(npz(tmp_path / "a.npz", **(PARTS | changed)))


def test_npz_without_the_names(tmp_path: Path) -> None:
    text = refusal(npz(tmp_path / "a.npz", data=np.ones(3), y=np.ones(3)))
    assert text == (
        "data.path: a.npz lacks x (got ['data', 'y']). Needed: x_train, y_train, "
        "x_test, y_test; or x, y. Save them by these names with numpy.savez."
    )
    # A part makes it a data set in parts: x and y are not taken in its stead.
    text = refusal(npz(tmp_path / "b.npz", x_train=np.ones(3), **ROWS))
    assert "b.npz lacks y_train, x_test, y_test" in text


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, fuse: Path) -> None:
        self.fuse = fuse

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.fuse,)


@pytest.mark.parametrize("form", ["pickle", "npy", "npz"])
def test_nothing_is_unpickled(tmp_path: Path, form: str) -> None:
    fuse, file = tmp_path / "lit", tmp_path / f"a.{form}"
    bomb = np.array([Bomb(fuse)] * 6, dtype=object)
    if form == "pickle":
        file.write_bytes(pickle.dumps(bomb))
    elif form == "npy":
        np.save(file, bomb, allow_pickle=True)
    else:
        np.savez(file, x=bomb, y=np.ones(6))
    text = refusal(
        ArraysSpec(path=str(file), target_path=None if form != "npy" else str(file))
    )
    assert "would run code" in text
    assert not fuse.exists()


def test_files_that_are_not_numpys(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    for content, message in [
        (b"", "a.npz is empty"),
        (b"x,y\n1,2\n", "a.npz is neither .npz nor .npy"),
        (pickle.dumps([1]), "a.npz is a pickle, and loading one would run code"),
        (b"PK\x03\x04", "a.npz is truncated or damaged. NumPy: File is not a zip file"),
    ]:
        file.write_bytes(content)
        assert message in refusal(ArraysSpec(path=str(file)))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", "text")
        archive.writestr("y.npy", "text")
    assert "x in a.npz is not an array" in refusal(ArraysSpec(path=str(file)))
    with zipfile.ZipFile(file, "w"):
        pass
    assert "a.npz lacks x, y (got [])" in refusal(ArraysSpec(path=str(file)))


def test_npy_pairs(tmp_path: Path) -> None:
    x, y, both = (tmp_path / name for name in ("x.npy", "y.npy", "both.npz"))
    np.save(x, np.ones((4, 2)))
    np.save(y, np.ones(3))
    np.savez(both, **ROWS)
    pairs: list[tuple[Path, Path | None, str]] = [
        (x, None, "data.target_path: inputs in an .npy file need another of targets"),
        (x, y, "data.target_path: x.npy and y.npy must have equal numbers of rows"),
        (x, both, "data.target_path: must be .npy, and is an .npz"),
        (both, y, "data.target_path: both.npz holds targets of its own"),
        (x, tmp_path / "z.npy", "data.target_path: no such file"),
    ]
    for inputs, targets, message in pairs:
        target_path = None if targets is None else str(targets)
        text = refusal(ArraysSpec(path=str(inputs), target_path=target_path))
        assert text.startswith(message)
    with y.open("ab") as stream:
        np.save(stream, np.ones(1))
    text = refusal(ArraysSpec(path=str(x), target_path=str(y)))
    assert "data.target_path: y.npy goes on after its array" in text


# ---- tables


def table(file: Path, text: str | bytes, **fields: Any) -> CsvSpec:
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return CsvSpec(path=str(file), **({"target": "y"} | fields))


SMALL = "y,a,b\n" + "".join(f"{i % 3},{i},{i * i / 4}\n" for i in range(8))


def test_a_table(tmp_path: Path) -> None:
    spec = table(tmp_path / "t.csv", SMALL, standardize=False, test_fraction=0.25)
    data = load(spec)
    order = generator(1).permutation(8)
    train, test = np.sort(order[:-2]), np.sort(order[-2:])
    a = np.arange(8, dtype=np.float32)
    x = np.stack([a, a * a / 4], axis=1)
    np.testing.assert_array_equal(data.x_train, x[train], strict=True)
    np.testing.assert_array_equal(data.x_test, x[test], strict=True)
    labels = np.arange(8, dtype=np.int32) % 3
    np.testing.assert_array_equal(data.y_train, labels[train], strict=True)
    np.testing.assert_array_equal(data.y_test, labels[test], strict=True)
    assert data.classes == 3


SAME: dict[str, Callable[[str], str | bytes]] = {
    "semicolons": lambda text: text.replace(",", ";"),
    "tabs": lambda text: text.replace(",", "\t"),
    "spaces": lambda text: text.replace(",", " , "),
    "windows": lambda text: text.replace("\n", "\r\n"),
    "old mac": lambda text: text.replace("\n", "\r"),
    "blank lines": lambda text: text.replace("\n", "\n\n"),
    "no last newline": lambda text: "\n" + text.rstrip(),
    "quotes": lambda text: re.sub(r"[^,\n]+", r' "\g<0>"', text),
    "byte order mark": lambda text: "\ufeff" + text,
    "gzip": lambda text: packed(text.encode()),
}


@pytest.mark.parametrize("change", SAME)
def test_tables_that_say_the_same(tmp_path: Path, change: str) -> None:
    expected = load(table(tmp_path / "t.csv", SMALL)).digest()
    changed = table(tmp_path / "u.csv", SAME[change](SMALL))
    assert load(changed).digest() == expected


def test_standardize_looks_at_train_rows_only(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = random.normal(5, 3, size=(50, 3))
    values[:, 1] = 0.1  # its mean is not 0.1 in floating point
    lines = [",".join(map(repr, map(float, row))) for row in values]
    text = "\n".join(["a,b,y", *lines])
    data = load(table(tmp_path / "t.csv", text))
    order = generator(1).permutation(50)
    train, test = np.sort(order[:-10]), np.sort(order[-10:])
    a = values[:, 0]
    expected = (a - a[train].mean()) / a[train].std()
    np.testing.assert_allclose(data.x_train[:, 0], expected[train], rtol=1e-5)
    np.testing.assert_allclose(data.x_test[:, 0], expected[test], rtol=1e-5)
    assert abs(data.x_train[:, 0].mean()) < 1e-6
    assert abs(data.x_train[:, 0].std() - 1) < 1e-6
    assert not data.x_train[:, 1].any()
    assert not data.x_test[:, 1].any()
    np.testing.assert_array_equal(data.y_test, values[test, 2].astype(np.float32))


@pytest.mark.parametrize(
    ("cells", "dtype", "classes"),
    [
        (["0", "+2", " 1 "], "int32", 3),
        (["0", "2", "1."], "float32", None),
        (["0", "2", "1e0"], "float32", None),
        (["-1.0", "2", "1"], "float32", None),
    ],
)
def test_targets_of_a_table_by_how_they_are_written(
    tmp_path: Path, cells: list[str], dtype: str, classes: int | None
) -> None:
    text = "a,y\n" + "".join(f"1,{cell}\n" for cell in cells)
    data = load(table(tmp_path / "t.csv", text))
    assert (str(data.y_train.dtype), data.classes) == (dtype, classes)
    assert data.y_train.shape == (2,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data.path: t.csv must start with the names of its columns"),
        ("1,2\n3,4\n", "must start with the names of its columns (got ['1', '2'])"),
        (",a,y\n0,1,2\n", "data.path: column 1 of t.csv has no name"),
        ("a,a,y\n0,1,2\n", "data.path: t.csv has two columns of one name (got 'a')"),
        ("y\n0\n1\n", "data.path: t.csv has no column besides the target (got 'y')"),
        (
            "a,why\n0,1\n",
            "data.target: not a column of t.csv (got 'y'). Columns: 'a', 'why'",
        ),
        ("a,y\n", "data.path: t.csv has no rows below its header"),
        ("a,y\n1,2\n\n1\n", "data.path: line 4 of t.csv must have 2 cells (got 1)"),
        ("a,y\n1,2,3\n", "data.path: line 2 of t.csv must have 2 cells (got 3)"),
        ("a,y\n1,2\nx,2\n", "line 3, column 'a' of t.csv must be a number (got 'x')"),
        ("a;y\n1;2,5\n", "column 'y' of t.csv must be a number (got '2,5'). Allowed"),
        ("a,y\n1,\n", "line 2, column 'y' of t.csv must be a number (got ''). Drop"),
        ("a,y\n\n1,2\nnan,0\n", "line 4, column 'a' of t.csv must be finite"),
        ("a,y\n1,1e39\n", "column 'y' of t.csv must be finite, and within float32"),
        (
            "a,y\n1,0\n2,1\n3,-1\n",
            "data.target: column 'y' of t.csv holds whole numbers",
        ),
        (f"a,y\n1,0\n2,1\n3,{10**30}\n", "(got 1000000000000000019884624838656)"),
        ('a,y\n1,2\n"1,2\n', "data.path: line 3 of t.csv is no line of a table"),
        (b"a,y\n1,\xff\n", "data.path: t.csv must be text in UTF-8"),
        ("a,y\n1,\0\n", "t.csv"),
    ],
)
def test_tables_that_are_refused(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    assert message in refusal(table(tmp_path / "t.csv", text))


def test_an_unknown_target_gets_the_nearest_and_a_short_list(tmp_path: Path) -> None:
    header = ",".join([*(f"c{i}" for i in range(100)), "price"])
    text = refusal(table(tmp_path / "t.csv", header + "\n", target="prize"))
    assert "'c18', 'c19', 81 more. Did you mean 'price'?" in text


# ---- any damage is told in one line


def files_of(folder: Path) -> dict[str, tuple[Path, DataSpec]]:
    small = {"x": np.arange(4.0), "y": np.arange(4)}
    np.savez(folder / "a.npz", **small)
    np.savez_compressed(folder / "b.npz", **small)
    np.save(folder / "x.npy", small["x"])
    np.save(folder / "y.npy", small["y"])
    pair = ArraysSpec(path=str(folder / "x.npy"), target_path=str(folder / "y.npy"))
    return {
        "npz": (folder / "a.npz", ArraysSpec(path=str(folder / "a.npz"))),
        "packed": (folder / "b.npz", ArraysSpec(path=str(folder / "b.npz"))),
        "npy": (folder / "x.npy", pair),
        "csv": (folder / "t.csv", table(folder / "t.csv", SMALL)),
        "idx": (folder / "t10k-labels-idx1-ubyte", mnist(folder)),
    }


@pytest.mark.parametrize("kind", ["npz", "packed", "npy", "csv", "idx"])
def test_damage_is_refused_in_one_line_or_harmless(tmp_path: Path, kind: str) -> None:
    file, spec = files_of(tmp_path)[kind]
    content = file.read_bytes()
    load(spec)
    damaged = [content[:n] for n in range(0, len(content), 7)]
    for place in range(0, len(content), 5):
        for mask in (0x01, 0x80):
            copy = bytearray(content)
            copy[place] ^= mask
            damaged.append(bytes(copy))
    texts = []
    for some in damaged:
        file.write_bytes(some)
        try:
            load(spec)
        except DataError as error:
            texts.append(str(error))
    assert len(texts) > len(damaged) // 10
    assert not any("\n" in text for text in texts)


@pytest.mark.parametrize("kind", ["npz", "packed"])
def test_a_flipped_bit_of_an_npz_is_never_data(tmp_path: Path, kind: str) -> None:
    file, spec = files_of(tmp_path)[kind]
    content = bytearray(file.read_bytes())
    expected, digests = load(spec).digest(), []
    for place in range(0, len(content), 3):
        content[place] ^= 0x04
        file.write_bytes(content)
        with contextlib.suppress(DataError):
            digests.append(load(spec).digest())
        content[place] ^= 0x04
    assert set(digests) <= {expected}  # where the zip has room to spare
    assert len(digests) < len(content) // 3


# ---- the order of rows


def reference(order: BatchOrder, first_step: int, steps: int) -> list[list[int]]:
    """One step at a time, in plain Python."""
    result = []
    for step in range(first_step, first_step + steps):
        epoch, position = divmod(step, order.rows // order.batch_size)
        made = order.generator_of_epoch(epoch)
        rows = list(range(order.rows)) if made is None else made.permutation(order.rows)
        start = position * order.batch_size
        result.append([int(row) for row in rows[start : start + order.batch_size]])
    return result


def no_generator(epoch: int) -> None:
    return None


@st.composite
def orders(draw: st.DrawFn) -> BatchOrder:
    rows = draw(st.integers(1, 40))
    batch_size = draw(st.integers(1, rows))
    return BatchOrder(
        rows, batch_size, draw(st.sampled_from([generator, no_generator]))
    )


@settings(deadline=None)
@given(orders(), st.integers(0, 200), st.integers(1, 60))
def test_indices_equal_a_plain_loop(
    order: BatchOrder, first_step: int, steps: int
) -> None:
    indices = order.indices(first_step, steps=steps)
    assert indices.dtype == np.int32
    assert indices.shape == (steps, order.batch_size)
    assert indices.tolist() == reference(order, first_step, steps)


@settings(deadline=None)
@given(orders(), st.integers(0, 10))
def test_an_epoch_reads_no_row_twice(order: BatchOrder, epoch: int) -> None:
    n = order.steps_per_epoch
    rows = order.indices(epoch * n, steps=n).ravel().tolist()
    assert len(set(rows)) == len(rows) == n * order.batch_size
    assert set(rows) <= set(range(order.rows))
    assert order.rows - len(rows) < order.batch_size


@settings(deadline=None)
@given(orders(), st.integers(0, 50), st.lists(st.integers(1, 20), min_size=1))
def test_chunks_of_any_size_read_the_same_rows(
    order: BatchOrder, first_step: int, chunks: list[int]
) -> None:
    whole = order.indices(first_step, steps=sum(chunks))
    parts, step = [], first_step
    for steps in chunks:
        parts.append(order.indices(step, steps=steps))
        step += steps
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_an_epoch_is_permuted_once_however_it_is_read() -> None:
    made: list[int] = []

    def note(epoch: int) -> np.random.Generator:
        made.append(epoch)
        return generator(epoch)

    order = BatchOrder(100, 7, note)
    for step in range(0, 140, 5):
        order.indices(step, steps=5)
    assert made == list(range(10))


def test_what_a_caller_does_to_indices_stays_with_the_caller() -> None:
    order = BatchOrder(8, 2, generator)
    first = order.indices(0, steps=4)
    expected = first.tolist()
    first[:] = 0
    assert order.indices(0, steps=4).tolist() == expected


def test_epochs_differ_and_are_all_rows() -> None:
    first, second = (epoch_order(generator(e), rows=50) for e in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert first.tolist() != second.tolist()
    assert epoch_order(None, rows=3).tolist() == [0, 1, 2]
    assert first.dtype == epoch_order(None, rows=3).dtype == np.int32


def test_a_batch_of_more_rows_than_there_are() -> None:
    with pytest.raises(DataError) as caught:
        BatchOrder(1437, 2000, generator)
    assert str(caught.value) == (
        "data.batch_size: must not exceed the 1437 rows to train on (got 2000). "
        "Set data.batch_size=1437 or less."
    )
    assert BatchOrder(3, 3, generator).steps_per_epoch == 1


@pytest.mark.parametrize(("first_step", "steps"), [(-1, 2), (0, 0)])
def test_steps_that_do_not_exist(first_step: int, steps: int) -> None:
    with pytest.raises(ValueError, match="no such steps"):
        BatchOrder(4, 2, generator).indices(first_step, steps=steps)
