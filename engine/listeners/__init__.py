"""Who listens to a learner: callbacks, subscribers, streams and observers."""
