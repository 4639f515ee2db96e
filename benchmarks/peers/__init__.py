"""The other sides of the training benchmark: each does the same documents with the library's own training loop."""
