"""The evidence document: its format, the claims in it, what binds them to a report, and the facts it establishes."""
