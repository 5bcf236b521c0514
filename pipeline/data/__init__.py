"""Data sets: reading, drawing, verifying, batching."""
