"""Continuous batching on the trainer's own tensors: prompts stored once a group, exact log-probs, seeded draws."""
