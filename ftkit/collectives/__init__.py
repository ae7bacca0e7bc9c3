"""Communication that can fail, is edited in place, and sums to the same bits."""
