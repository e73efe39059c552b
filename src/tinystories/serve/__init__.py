"""An HTTP server that answers as OpenAI's does, with continuous batching over the slots of one engine.

Needs the extra `[serve]`; imports nothing of training.
"""
