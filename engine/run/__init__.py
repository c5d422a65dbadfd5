"""One fit: its plan, its thread, its end and its result."""
