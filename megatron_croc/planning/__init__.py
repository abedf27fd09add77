"""Estimates without a GPU: operations, memory and time of a step, and the layouts that fit."""
