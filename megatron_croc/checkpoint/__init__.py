"""Save, resume, and start from another stage's weights."""
