"""One adapter per kernel library. Each makes `Candidate`s, which peers.py checks and times alike."""
