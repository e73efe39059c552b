"""Stories without torch: machine code over mapped weights. docs/cpu-engine.md says how it works."""
