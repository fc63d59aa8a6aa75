"""Documents to batches: each stage an iterator that can hand out its state."""
