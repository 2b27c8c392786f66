"""What ends a benchmark with exit status 2 and a text that says what to do."""


class Unusable(Exception):
    """An option, a file or this machine cannot be used for what was asked."""
