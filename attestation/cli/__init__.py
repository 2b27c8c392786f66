"""The command line of `python -m adytum.attestation`."""
