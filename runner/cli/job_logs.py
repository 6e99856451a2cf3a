# SPDX-License-Identifier: Apache-2.0
"""Logs of jobs that run beside each other: each line goes to the files of its job."""

import contextlib
import logging
import logging.config
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.core.utils import configure_log
from omegaconf import DictConfig, OmegaConf

__all__ = ["JobLogs"]


class JobLogs(logging.Handler):
    """Hands each record to the files of the job that its thread works for.

    It stands wherever `hydra.job_logging` has a handler with a `filename`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._of_thread = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        """Writes it to the files of the job; outside of one, nowhere."""
        for handler in getattr(self._of_thread, "handlers", ()):
            if record.levelno >= handler.level:
                handler.handle(record)

    def install(self, config: DictConfig) -> None:
        """Configures logging as for a job, but for its files."""
        content = _logging_of(config)
        if content.get("root") is None:
            configure_log(config.hydra.job_logging, config.hydra.verbose)
            return
        files = _files_of(content)
        places = {"": content["root"], **content.get("loggers", {})}
        taking = [name for name, place in places.items() if _drop(place, files)]
        content["handlers"] = {
            name: handler
            for name, handler in content.get("handlers", {}).items()
            if name not in files
        }
        configure_log(OmegaConf.create(content), config.hydra.verbose)
        for handler in logging.getLogger().handlers:
            handler.addFilter(_Once())
        for name in taking:
            logging.getLogger(name).addHandler(self)

    @contextlib.contextmanager
    def of(self, content: Mapping[str, Any]) -> Iterator[None]:
        """While this thread works for a job, whose resolved `job_logging` is given."""
        handlers = list(_open(content))
        before = getattr(self._of_thread, "handlers", ())
        self._of_thread.handlers = handlers
        try:
            yield
        finally:
            self._of_thread.handlers = before
            for handler in handlers:
                handler.close()


class _Once(logging.Filter):
    """Shows a warning once: lanes of one program have the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is shown; the log of each job has it in any case."""
        text = record.getMessage()
        is_known = record.levelno == logging.WARNING and text in self._shown
        self._shown.add(text)
        return not is_known


def _logging_of(config: DictConfig) -> dict[str, Any]:
    content: Any = OmegaConf.to_container(config.hydra.job_logging, resolve=True)
    return content or {}


def _files_of(content: Mapping[str, Any]) -> dict[str, Any]:
    handlers = content.get("handlers") or {}
    return {name: each for name, each in handlers.items() if "filename" in each}


def _drop(place: dict[str, Any], files: Mapping[str, Any]) -> bool:
    """Takes files off a logger's handlers; whether there were any."""
    names = place.get("handlers") or []
    place["handlers"] = [name for name in names if name not in files]
    return len(place["handlers"]) < len(names)


def _open(content: Mapping[str, Any]) -> Iterator[logging.Handler]:
    """The files of a job, as `logging.config` makes them."""
    maker = logging.config.DictConfigurator(dict(content))
    formatters = maker.config.get("formatters", {})
    for name in formatters:
        formatters[name] = maker.configure_formatter(formatters[name])
    for handler in _files_of(content).values():
        made: Any = maker.configure_handler(dict(handler))
        yield made
