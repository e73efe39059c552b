"""The Hugging Face Hub: download, push, model cards, published weights."""
