"""The command `lowbit`: one file a command; `main.py` parses."""
