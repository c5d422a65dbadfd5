"""The data side: loaders, and what can be said of a batch. It does not depend on the loop."""
