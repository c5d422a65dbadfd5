"""The loop: its four scopes, its state, and the requests that reach it from outside."""
