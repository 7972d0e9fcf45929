"""Exceptions that callers may want to catch by type."""


class PeftError(Exception):
    """Base class of the errors that this package defines."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """No module of the model matches the configuration's targets."""
