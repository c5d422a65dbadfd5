"""A web service that trains, streams, stops and is observed: python -m examples.service.

- `__main__`: options, uvicorn, shutdown; `settings`: the limits; `logs`: where lines go
- `guard`: who may ask; `app` and `routes`: what can be asked for
- `runs`: one learner a run; `data`: what it trains on
- `journal`: what happened in a run, numbered and bounded; `stream`: the same, server-sent
- `page/`: what a browser shows
"""
