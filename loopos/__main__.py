"""``python -m loopos``."""

from loopos.cli import main

main()
