"""The composition room: command line and process mains, the only place that knows both
`transport` and `sync`.
"""
