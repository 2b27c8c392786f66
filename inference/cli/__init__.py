"""The command line `adytum`, one file a command."""
