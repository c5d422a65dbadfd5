"""Data loaders and batches. This package does not depend on the loop."""
