"""Detection of faults in a run: anomalies, stalled or lost ranks, requests to stop."""
