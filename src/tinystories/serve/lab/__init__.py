"""The endpoints of the lab page, /lab/api: JSON for text, bytes for matrices."""
