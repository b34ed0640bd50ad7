"""The Python side of the native decoder, and those in torch and transformers for what it has no words for."""
