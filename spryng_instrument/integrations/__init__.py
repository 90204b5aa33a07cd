"""Whose usage it is, where frameworks, queues, threads and other services know it; each module is imported by itself.

asgi, wsgi      a middleware: Starlette, FastAPI, Flask and everything else that speaks them
django          a middleware that sees the HttpRequest, and so its user
celery          from whoever sends a task into the worker that runs it
baggage         from one service into the next, as W3C Baggage
executors       into thread pools, and into threads
"""
