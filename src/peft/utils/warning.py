"""The warning category of this package, so that users can filter it."""


class PeftWarning(UserWarning):
    """Something that is legal but probably not meant."""
