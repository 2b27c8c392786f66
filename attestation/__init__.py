"""Evidence about a adytum backend: what it is made of, how it is collected and how anybody verifies it.

Stand-alone: imports the standard library and `cryptography`, nothing else. Start with README.md.
"""
