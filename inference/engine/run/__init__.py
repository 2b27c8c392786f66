"""One engine process: how it is started, what it may see, what of its log is kept."""
