"""Commands that exchange models with others: export, import, push, fetch."""
