"""Local tasks: questions with true answers, and the metrics of what a model answers."""
