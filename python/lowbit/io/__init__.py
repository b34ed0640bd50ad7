"""Checkpoint formats, one file each; every reader checks what it reads and names file, tensor and
value.
"""
