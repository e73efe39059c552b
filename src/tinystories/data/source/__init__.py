"""Where stories come from: named sources, files and the Hugging Face Hub."""
