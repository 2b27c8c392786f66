"""Whole backends under load: the arms of a comparison, the machine they ran on, and the soak test."""
