"""Attacks on the program: damaged files, kills, full disks, signals, read-only homes, many processes (README.md)."""
