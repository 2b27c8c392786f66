"""What confidentiality costs, measured. README.md says how; NOTES.md has what was predicted, changed and measured."""
