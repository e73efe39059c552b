"""llama2.c checkpoints and their tokenizer.bin."""
