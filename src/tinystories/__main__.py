"""`python -m tinystories` is the command `tinystories`; torchrun starts its workers so."""

from tinystories.cli import main

if __name__ == "__main__":
    main()
