"""Answers of a trained model, from a checkpoint or an export."""
