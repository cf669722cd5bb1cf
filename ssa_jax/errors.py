"""Errors that a user can mend."""


class ConfigError(ValueError):
    """A setting that no run can have."""


class DataError(ValueError):
    """A data set is missing, not readable, or not what its name says."""


class NotFiniteError(ArithmeticError):
    """The loss or a parameter is NaN or infinite."""
