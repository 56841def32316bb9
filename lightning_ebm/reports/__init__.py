"""What a run left behind, read, judged, and shown."""
