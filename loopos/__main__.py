"""``python -m loopos``."""

from loopos.cli import main

if __name__ == "__main__":
    main()
