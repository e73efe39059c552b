"""Import from, export to and compare with other programs; Hugging Face Hub; benchmarks."""
