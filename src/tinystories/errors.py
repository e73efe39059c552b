"""The one exception meant for people. Stands below everything else."""


class UserError(Exception):
    """A mistake the user can mend: one line that says what, where and how to mend it.

    Only `cli/command.py` catches it; it prints the line to stderr and exits with code 2.
    """
