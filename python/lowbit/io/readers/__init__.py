"""Readers of other projects' checkpoints, a file per format."""
