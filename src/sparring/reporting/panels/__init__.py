"""One panel a file; a module put here is found by itself.

A panel exposes `ORDER: int`, its place on the page; `TITLE: str`, its heading; and
`render(run: Run) -> str | None`, its HTML, or None when the run has nothing for it.
"""
