"""What can go wrong, as exceptions that the command line prints as one line.

A user's mistakes exit with code 1, a lost link to another rank with the code to restart on.
"""


class UserError(Exception):
    """A mistake that the reader of the message can mend: says what is wrong, what is right and what to do."""


class ConfigError(UserError):
    """The run description is wrong."""


class DataError(UserError):
    """The data are missing, unreadable or not what the run description says."""


class ShardingError(UserError):
    """The tables cannot be placed on the devices that there are."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another run."""


class StateDictError(UserError):
    """A plain state dict cannot be read or does not fit the run."""


class OutputError(UserError):
    """The output folder cannot be written."""


class MetricError(UserError):
    """A metric is not defined on these rows."""


class InstallError(UserError):
    """What is installed does not fit together."""


class LostLinkError(Exception):
    """Another rank is gone or does not answer. Nobody's mistake: this rank ends too, for a restart to go on."""
