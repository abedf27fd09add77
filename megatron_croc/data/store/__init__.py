"""Storage of dataset folders, on disk or in S3: shards, indexes, manifests, lengths."""
