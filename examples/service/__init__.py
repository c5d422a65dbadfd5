"""A web service that runs fits, streams their events and stops them: python -m examples.service.

- `__main__`: options, uvicorn, shutdown; `settings`: the limits; `logs`: where log lines go
- `guard`: which requests are admitted; `app` and `routes`: the HTTP interface
- `runs`: one learner per run; `data`: the datasets
- `journal`: the messages of a run, numbered and bounded; `stream`: the same as server-sent events
- `page/`: the page for browsers
"""
