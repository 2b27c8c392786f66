"""The appraisal policy: its rules and its file."""
