# SPDX-License-Identifier: Apache-2.0
"""JAX's process-wide settings, made before a program is compiled."""

from pathlib import Path

import jax
import platformdirs

__all__ = ["set_compile_cache"]


def set_compile_cache(directory: str | None) -> None:
    """Keeps compiled programs on disk, so that the second start is quick.

    Args:
        directory: Where; `auto` is the user's cache directory, None is nowhere.
    """
    if directory is None:
        return
    home = Path(platformdirs.user_cache_dir("jax-runner")) / "xla"
    path = home if directory == "auto" else Path(directory).expanduser().resolve()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
