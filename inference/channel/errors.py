"""The channel's closed set of errors, split by who is at fault.

Whatever a peer sends and whatever the cryptography library raises, the caller sees one of these. The texts describe
what was wrong with the framing, never content or keys. The gateway does not send even these texts to a peer before that
peer's request is open.
"""


class ChannelError(Exception):
    """Base class of the package's errors."""


class MalformedMessage(ChannelError):
    """The peer's bytes do not follow the wire format."""


class TruncatedMessage(MalformedMessage):
    """The message ended before its authenticated end."""


class MessageTooLarge(ChannelError):
    """A part of the message exceeds a named limit (`Limits`)."""


class UnknownKey(ChannelError):
    """The receiver does not hold this key or does not offer this suite. The sender should fetch the keys again."""


class OpenFailed(ChannelError):
    """A ciphertext did not authenticate: the key is wrong, or the bytes were modified in transit."""


class ExchangeMisuse(ChannelError):
    """Our own code called an exchange out of order, or continued after an error."""
