"""The errors that sparseprune raises, all below `SparsepruneError`."""

from __future__ import annotations

__all__ = [
    "CudaError",
    "FormatError",
    "SparsepruneError",
    "SparsepruneWarning",
    "UnsupportedError",
    "VerificationError",
]


class SparsepruneError(Exception):
    """Base of every error of this package that is not a plain `ValueError` or `TypeError`."""


class CudaError(SparsepruneError, RuntimeError):
    """The driver or a CUDA call failed; the message names the call and the error, or says what to install."""


class FormatError(SparsepruneError, ValueError):
    """A file, or bytes, that are not a valid program or weights file."""


class UnsupportedError(SparsepruneError, NotImplementedError):
    """A model holds an operator, attribute or layer that cannot be converted; the message names both."""


class VerificationError(SparsepruneError, AssertionError):
    """The output of a converted program, or of a compacted model, is beyond the error bound of the masked one's."""


class SparsepruneWarning(UserWarning):
    """Something works, but not as fast, or not as widely, as it could; the message says why."""
