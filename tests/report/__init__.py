"""The reports, from records made up for the purpose; the HTML one in a real browser."""
