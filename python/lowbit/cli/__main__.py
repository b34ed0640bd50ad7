"""`python -m lowbit.cli`."""

from lowbit.cli.main import main

main()
