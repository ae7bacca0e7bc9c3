"""Live tensors to durable bytes, and back to tensors of another world."""
