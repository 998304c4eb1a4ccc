"""How many threads programs run on."""

from __future__ import annotations

from . import _native

__all__ = ["num_threads", "set_num_threads"]


def num_threads() -> int:
    """Threads of a program's run: what `set_num_threads` said, else the cores that affinity and cgroup quota allow."""
    return _native.num_threads()


def set_num_threads(n: int) -> None:
    """Sets the number of threads of later runs, in every program of this process. Results do not depend on it, bitwise.

    Raises:
        TypeError: `n` is no integer.
        ValueError: `n` is not in [1, 256].

    Example:
        >>> sparseprune.set_num_threads(2)
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n: expected an int, got {type(n).__name__}")
    if not 1 <= n <= 256:
        raise ValueError(f"n={n} must be between 1 and 256")
    _native.set_num_threads(n)
