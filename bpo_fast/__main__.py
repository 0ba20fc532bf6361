"""`python -m bpo_fast` is `bpo-fast`."""

from bpo_fast.cli import main

main()
