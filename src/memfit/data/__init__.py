"""What a model is trained on: read from where it is, cut into batches in an order that never changes."""
