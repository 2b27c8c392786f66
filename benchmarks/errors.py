"""The error that ends a benchmark with exit status 2 and a text that says what to do."""


class Unusable(Exception):
    """An option, a file or this machine is unsuitable for the requested measurement."""
