"""The web view of a run: events and status rows in, a page that keeps itself up to date out."""
