"""Simulated CPU evidence, for development. It has the shape of the real thing and proves nothing about hardware."""
