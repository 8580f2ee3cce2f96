"""`python -m psyche_fast` is the `psyche-fast` command."""

from psyche_fast.cli import main

if __name__ == "__main__":
    main()
