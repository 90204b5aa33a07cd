"""The server of the Track Usage API: `spryng serve`.

`app` is the ASGI application, `committer` what records for it, `reading` what answers questions, `keys` who may use it.
"""
