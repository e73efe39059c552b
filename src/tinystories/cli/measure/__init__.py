"""Commands that measure and describe: eval, trace, bench, info."""
