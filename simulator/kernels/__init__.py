"""What one kernel must do: pure functions from extents to an `Op`.  No GPU, no layer, no parallelism."""
