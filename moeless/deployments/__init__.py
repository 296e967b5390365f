"""The Ray Serve deployments: one worker each, one function each, the engine, the gateway.

Wiring only: what they wire lives in functions, dispatch, engine and gateway. `application` builds the application.
"""
