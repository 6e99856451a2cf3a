# SPDX-License-Identifier: Apache-2.0
"""Records as a stranger may make them: edited, with every digest made to fit again.

A library for the tests of damaged, hostile and random records.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from runner.records.digests import digest_config, digest_manifest, digest_plain

__all__ = ["Parts", "forge", "make_probe", "make_run", "pack", "seal_checkpoints"]

_RUN = (
    *("+experiment=dropout", "model.features=[16]", "data.batch_size=64"),
    *("train.steps=24", "eval.every=8", "sinks=none"),
    *("checkpoint.every=8", "checkpoint.keep=3", "checkpoint.digest_every=6"),
)
_PROBE = ("+experiment=rng/submodules", "sinks=none")


@dataclass
class Parts:
    """What is in a record, to be edited in place.

    Args:
        manifest: `run.json`; its digests are computed afterwards.
        config: `config.yaml`.
        ledger: `keys/ledger.json`.
        texts: Contents by name that replace whatever else would be written.
        keeps: Names of digests that stay as they are in `manifest`.
    """

    manifest: dict[str, Any]
    config: dict[str, Any]
    ledger: dict[str, Any]
    texts: dict[str, bytes] = field(default_factory=dict)
    keeps: tuple[str, ...] = ()


def make_run(directory: Path, *, env: dict[str, str]) -> Path:
    """A run of 24 steps with three checkpoints, on eight devices as the tests have."""
    return _start(_RUN, directory, env)


def make_probe(directory: Path, *, env: dict[str, str]) -> Path:
    """A run that leaves `outputs.npz`."""
    return _start(_PROBE, directory, env)


def _start(args: tuple[str, ...], directory: Path, env: dict[str, str]) -> Path:
    subprocess.run(
        [sys.executable, "-m", "runner", *args, f"hydra.run.dir={directory}"],
        cwd=directory.parent,
        env={**env, "JAX_NUM_CPU_DEVICES": "8"},
        check=True,
        capture_output=True,
        timeout=200,
    )
    return directory


def forge(
    run: Path, target: Path, edit: Callable[[Parts], object] = lambda parts: None
) -> Path:
    """A copy of a run after an edit, consistent again.

    Args:
        run: A good run directory.
        target: The copy.
        edit: Changes the parts in place.
    """
    shutil.copytree(run, target, symlinks=True)
    parts = Parts(
        json.loads((run / "run.json").read_text()),
        yaml.safe_load((run / "config.yaml").read_text()),
        json.loads((run / "keys" / "ledger.json").read_text()),
    )
    edit(parts)
    for name, content in _texts(parts).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    seal_checkpoints(target)
    _seal(parts, target)
    return target


def _texts(parts: Parts) -> dict[str, bytes]:
    config = yaml.safe_dump(parts.config, sort_keys=False).encode()
    ledger = json.dumps(parts.ledger).encode()
    return {"config.yaml": config, "keys/ledger.json": ledger, **parts.texts}


def _seal(parts: Parts, target: Path) -> None:
    """The manifest, with the digests of what lies there."""
    manifest = parts.manifest
    digests = manifest.get("digests")
    if isinstance(digests, dict):
        new: dict[str, Any] = {
            "config": digest_config(parts.config),
            "keys": digest_plain(parts.ledger),
        }
        for name in ("metrics.jsonl", "states.jsonl", "outputs.npz"):
            if (target / name).is_file():
                new[name.partition(".")[0]] = _sha256((target / name).read_bytes())
        digests |= {k: v for k, v in new.items() if k not in parts.keeps}
    manifest["digest"] = digest_manifest(manifest)
    if "run.json" not in parts.texts:
        (target / "run.json").write_text(json.dumps(manifest))


def seal_checkpoints(run: Path) -> None:
    """Every checkpoint's list with the digests of the files that lie there."""
    for listed in (run / "checkpoints").glob("*.json"):
        folder = listed.with_suffix("")
        if not listed.is_file():
            continue
        plain = json.loads(listed.read_text())
        plain["files"] = dict(_digests(folder))
        for part, written in plain["written"].items():
            content = (run / f"{part}.jsonl").read_bytes()[: written["size"]]
            written |= {"size": len(content), "sha256": _sha256(content)}
        rest = {k: v for k, v in plain.items() if k != "digest"}
        listed.write_text(json.dumps({**rest, "digest": digest_plain(rest)}))


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), _sha256(path.read_bytes())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def pack(run: Path, archive: Path) -> Path:
    """An archive of a run, by the end of its name: `.zip`, `.tar` or `.tar.gz`."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
            for path in files:
                zipped.write(path, os.path.relpath(path, run.parent))
        return archive
    mode: Any = "w:gz" if archive.suffix == ".gz" else "w"
    with tarfile.open(archive, mode) as tarred:
        for path in files:
            tarred.add(path, os.path.relpath(path, run.parent), recursive=False)
    return archive
