"""What confidentiality costs, measured. README.md says how; NOTES.md records predictions, changes and results."""
