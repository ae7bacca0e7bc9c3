"""Persistent checkpoints: zarr arrays, a parquet manifest, and a commit record written last.

The line of a checkpoint: `plan` (who holds which box) → `write` (boxes to files, a fragment of
the manifest) → `commit` (fragments to a checkpoint) → `checkpoint` (read, verify) → `gc`.
"""
