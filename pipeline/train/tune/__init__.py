"""What learns where not all weights do: the last blocks, low-rank updates, or the heads alone."""
