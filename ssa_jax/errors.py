"""Errors that a user can mend."""


class ConfigError(ValueError):
    """A setting that no run can have."""


class NotFiniteError(ArithmeticError):
    """The loss or a parameter is NaN or infinite."""
