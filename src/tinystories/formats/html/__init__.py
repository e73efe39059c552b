"""A storyteller in one HTML file."""
