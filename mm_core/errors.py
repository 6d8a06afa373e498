"""Every error mm raises on purpose. The message names the thing, the bound it broke and the way out.

MMError
├── ConfigError          wrong use: unknown key, unknown recipe, values that contradict (exit code 2)
├── DataError            shards, indexes or ledgers that are missing, unreadable or too bad
│   └── StreamOrderError a block arrived that the plan did not put next
├── CheckpointError      a checkpoint that is missing, damaged or of another run
├── BundleError          a model folder that is missing, damaged or of another kind
├── TrainingError        training cannot go on: NaN, a worker lost for good
└── ServiceError         a port, address, tracking server or cluster that does not answer
"""

from __future__ import annotations


class MMError(Exception):
    """Root of the tree. `exit_code` is what the command line returns for it."""

    exit_code = 1


class ConfigError(MMError):
    exit_code = 2


class DataError(MMError):
    pass


class StreamOrderError(DataError):
    pass


class CheckpointError(MMError):
    pass


class BundleError(MMError):
    pass


class TrainingError(MMError):
    pass


class ServiceError(MMError):
    pass
