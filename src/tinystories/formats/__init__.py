"""Models of other programs: read, write and verify each format. No format imports another."""
