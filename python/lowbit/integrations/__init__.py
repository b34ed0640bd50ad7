"""Other projects' models on packed weights; each submodule imports its project."""
