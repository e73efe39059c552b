"""What a model computes for a text, for people: words instead of ids, HTML, pictures. Importing it imports no torch."""
