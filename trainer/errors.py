"""What a user can do wrong, as exceptions; the command line prints each as one line and exits with code 1."""


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
    """A metric cannot be computed."""


class OneClassError(MetricError):
    """A metric is not defined, as these rows are all clicks or none is."""


class InstallError(UserError):
    """What is installed does not fit together."""


class RunFailedError(UserError):
    """A run that this process started did not come to its end."""
