"""Commands that prepare data and train: prepare, train, sweep."""
