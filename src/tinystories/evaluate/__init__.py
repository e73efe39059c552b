"""Model evaluation. Importing this package does not import torch."""
