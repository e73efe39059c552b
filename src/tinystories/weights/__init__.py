"""The weights of a model as NumPy arrays: names and shapes, safetensors files, quantization, loading. Without torch."""
