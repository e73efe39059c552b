"""Commands that measure and describe: eval, bench, info."""
