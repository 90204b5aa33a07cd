"""The dashboard: pages for people, of the same figures as the API, the command line and the bills.

Invariant: it only reads, but for sign-in and signed links; every page is whole without JavaScript; nothing on it that
came with a message is markup.

`routes` says who may have a page; `usage`, `messages` and `bills` are the pages; `layout`, `question`, `answers` and
`tables` are what they share, and import none of them.

There is nothing to build: static/ is sent as it is. htmx is htmx.org 4.0.1 of the npm registry, unchanged, under the
licence beside it; it saves reloads, and finds keys while their name is typed.
"""
