"""The channel: HPKE, key configurations, binary HTTP, Oblivious HTTP, EHBP, padding. No IO, no clock, no logging.

Imports the standard library and `cryptography` only. Whatever a peer sends, `ChannelError` is the only exception type
that leaves the package.
"""
